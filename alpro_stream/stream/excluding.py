"""Which samples of a data set an exclude list takes out, and how many units go with them."""

import hashlib
import logging
from collections.abc import Sequence, Set
from typing import NamedTuple

from alpro_stream.errors import SampleError
from alpro_stream.manifest import Kind
from alpro_stream.shards.files import CachedFiles
from alpro_stream.shards.reader import ShardReader
from alpro_stream.stream.units import COUNTED, Unit, texts_of

logger = logging.getLogger(__name__)


class Excluded(NamedTuple):
    """What is not used of a data set.

    Attributes:
        slots: by shard.
        num_units: that go with them, by shard.
        digest: of the keys of these samples; None where there are none.
    """

    slots: dict[str, tuple[int, ...]]
    num_units: dict[str, int]
    digest: str | None


def find_excluded(reader: ShardReader, place: str, keys: Set[str], kind: Kind | None, unit: Unit) -> Excluded:
    """Looks for the keys in the indexes of all shards, and warns of those that are nowhere.

    Behind addresses, several indexes are fetched at a time; captions and questions also need the tars of the shards
    that lose a sample.

    Args:
        reader: of the data set.
        place: of the list, for messages.
        keys: of the list.
        kind: of the samples that are used at all; None for both.
        unit: what a pass counts.

    Raises:
        ShardError: an index or a tar that cannot be read.
    """
    slots: dict[str, tuple[int, ...]] = {}
    found: set[str] = set()
    used: set[str] = set()
    example = ""
    shards = reader.info.shards if keys else []
    if isinstance(reader.files, CachedFiles):
        reader.files.cache.expect([reader.files.index(shard) for shard in shards])
    for shard in shards:
        of_shard = reader.index(shard.name).keys()
        example = example or next(filter(None, of_shard), "")
        # One list may be for the videos and the images, and the source for one of them.
        taken = {slot: key for slot, key in enumerate(of_shard) if key in keys}
        found.update(taken.values())
        if taken and kind in (None, shard.kind):
            slots[shard.name] = tuple(taken)
            used.update(taken.values())
    if unit != "clip" and isinstance(reader.files, CachedFiles):
        reader.files.cache.expect([reader.files.tar(shard) for shard in shards if shard.name in slots])
    num_units = {name: _num_units(reader, name, numbers, unit) for name, numbers in slots.items()}
    _tell(reader.place, place, keys, found, sum(map(len, slots.values())), example)
    return Excluded(slots, num_units, hashlib.sha256("\n".join(sorted(used)).encode()).hexdigest() if used else None)


def _num_units(reader: ShardReader, shard: str, slots: Sequence[int], unit: Unit) -> int:
    """Units of some samples of a shard."""
    if unit == "clip":
        return len(slots)
    try:
        return sum(len(texts_of(unit, reader.metadata(shard, slot))) for slot in slots)
    except SampleError:  # for how many a damaged one counts, the rest of the shard tells
        return int(reader.counts(shard)[list(slots), COUNTED[unit]].sum())


def _tell(dataset: str, place: str, keys: Set[str], found: Set[str], num_excluded: int, example: str) -> None:
    if strange := sorted(keys - found):
        logger.warning(
            "%s: %d of the %d keys of the exclude list %s are none of its samples, such as %r; the keys of its samples "
            "are such as %r",
            dataset, len(strange), len(keys), place, strange[0], example,
        )  # fmt: skip
    logger.info("%s: %d samples excluded by the %d keys of %s", dataset, num_excluded, len(keys), place)
