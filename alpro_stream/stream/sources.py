"""Sources: the shards of one kind of one data set, opened for reading."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from alpro_stream.config import Config
from alpro_stream.errors import PlanError, ShardError
from alpro_stream.manifest import KINDS, Kind
from alpro_stream.manifest.places import is_address
from alpro_stream.media import FetchConfig
from alpro_stream.shards.cache import CacheConfig, ShardCache
from alpro_stream.shards.exclude import parse_exclude
from alpro_stream.shards.files import CachedFiles
from alpro_stream.shards.layout import DatasetInfo, ShardInfo, load_dataset_info
from alpro_stream.shards.reader import ShardReader
from alpro_stream.shards.remote_files import read_file
from alpro_stream.stream.excluding import find_excluded
from alpro_stream.stream.plan import SourceShape
from alpro_stream.stream.units import COUNTED, Unit, clip_units, text_units

MOST_OPEN_SHARDS = 512
"""Shards that a rank keeps open at the most, of all its data sets: a process may have 1,024 files open by default."""
_FEW_SHARDS = 64
Place = Annotated[str, BeforeValidator(str)]
"""A local path or an address."""


class SourceConfig(Config):
    """Samples of one data set."""

    path: Place
    """The folder of a split, with its dataset.json: a path, or an address (``s3://``, ``http://``, ``https://``). Or a
    local folder of tars that other tools wrote."""
    kind: Kind | None = None
    """Which of its shards; null makes a source of each kind it has, as a batch holds one kind only (published)."""
    name: str = ""
    """Part of every seed; the kind when it is left empty, and ``name-kind`` when one name covers both kinds."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the steps under `mix: weights`."""
    exclude: Place | None = None
    """File with the keys of samples that are not to be used, one a line (`alpro_stream.shards.exclude`)."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What is known of a data set before its shards are opened; read once, by the first rank.

    Attributes:
        info: the description.
        excluded: slots that are not used, by shard.
        num_removed: units that go with them, by shard.
        exclude_digest: of the keys that are found and not used; None where there are none.
    """

    info: DatasetInfo
    excluded: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_removed: Mapping[str, int] = field(default_factory=dict)
    exclude_digest: str | None = None


@dataclass(frozen=True)
class Source:
    """One kind of sample of one data set: the reader and the shards of that kind, in the order of the data set."""

    name: str
    kind: Kind
    reader: ShardReader
    shards: tuple[ShardInfo, ...]
    weight: float
    unit: Unit
    listing: Listing

    @property
    def shape(self) -> SourceShape:
        """What the plan needs to know."""
        return SourceShape(self.name, tuple(self._num_units(shard) for shard in self.shards), self.weight)

    @property
    def payload(self) -> str:
        """What a sample holds: `frames`, or a whole `video`."""
        return str(self.reader.info.options.get("payload", "frames"))

    @property
    def content(self) -> str:
        """A short digest of the samples that are used."""
        return hashlib.sha256(f"{self.reader.info.digest} {self.listing.exclude_digest}".encode()).hexdigest()[:16]

    @property
    def stores_videos(self) -> bool:
        """Whether a sample is a whole video, and not frames of it."""
        return self.kind == "video" and self.payload == "video"

    @property
    def stored_size(self) -> int | None:
        """Side of the stored frames, pixels; None where they are not all squares of one size."""
        options = self.reader.info.options.get("frames")
        if not isinstance(options, dict) or options.get("resize", "square") != "square":
            return None
        size = options.get("size")
        return size if isinstance(size, int) else None

    def locate(self, shard: int, unit: int) -> tuple[int, int | None]:
        """Slot of a unit in its shard and, for captions and questions, which of the sample's texts.

        Raises:
            ShardError: the shard cannot be read.
        """
        if self.unit == "clip":
            slots = self._units(shard)
            return (unit if slots is None else int(slots[unit])), None
        units = self._units(shard)
        assert units is not None
        if unit >= len(units):
            raise ShardError(
                f"{self.reader.place}: {self.shards[shard].name} has {len(units)} {self.unit}s, fewer than its "
                "dataset.json says; shard the corpus again"
            )
        slot, number = units[unit].tolist()
        return slot, number

    def _num_units(self, shard: ShardInfo) -> int:
        total = {"clip": shard.num_samples, "caption": shard.num_captions, "question": shard.num_questions}[self.unit]
        return total - self.listing.num_removed.get(shard.name, 0)

    @cached_property
    def _units(self) -> Any:
        # A rank has a few hundred shards in hand at a time, see `ShardReader`.
        return lru_cache(maxsize=512)(self._make_units)

    def _make_units(self, shard: int) -> NDArray[np.int64] | None:
        """Of `alpro_stream.stream.units`; None where units are slots."""
        info = self.shards[shard]
        excluded = self.listing.excluded.get(info.name, ())
        if self.unit == "clip":
            return clip_units(info.num_samples, excluded) if excluded else None
        return text_units(self.reader.counts(info.name)[:, COUNTED[self.unit]], excluded)


@dataclass(frozen=True, slots=True)
class Storage:
    """How shards behind addresses are reached.

    Attributes:
        fetch: for every request.
        cache: holds whole shards; None where all data sets are local.
        max_open: shards of a data set that are kept open.
    """

    fetch: FetchConfig = field(default_factory=FetchConfig)
    cache: ShardCache | None = None
    max_open: int = 64


def shards_kept_open(read_at_once: int, num_datasets: int) -> int:
    """Shards of each data set that a rank keeps open.

    Args:
        read_at_once: shards of a data set that its lanes read at a time.
        num_datasets: of the run; they share the files that a process may have open.
    """
    return max(1, min(max(_FEW_SHARDS, read_at_once), MOST_OPEN_SHARDS // num_datasets))


@contextmanager
def closing_storage(
    configs: Sequence[SourceConfig],
    cache: CacheConfig,
    fetch: FetchConfig,
    *,
    max_open: int = 64,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Storage]:
    """How to reach the data sets: with a cache if any of them lies behind an address; it ends with the block.

    Args:
        configs: the data sets.
        cache: of those behind addresses.
        fetch: for every request.
        max_open: shards of a data set that are kept open.
        waiting: entered while something waits for the cache.
    """
    if not any(is_address(config.path) for config in configs):
        yield Storage(fetch, None, max_open)
        return
    with closing(ShardCache(cache, fetch, waiting)) as opened:
        yield Storage(fetch, opened, max_open)


def read_listings(
    configs: Sequence[SourceConfig], unit: Unit = "clip", storage: Storage = Storage()
) -> tuple[Listing, ...]:
    """Reads what is known of each data set; this, and not `open_sources`, is what the first rank does for all.

    Raises:
        ShardError: no data set there, or an exclude list that cannot be read.
    """
    return tuple(_list(config, unit, storage) for config in configs)


def open_sources(
    configs: Sequence[SourceConfig],
    unit: Unit = "clip",
    storage: Storage = Storage(),
    listings: Sequence[Listing] | None = None,
) -> tuple[Source, ...]:
    """Opens all sources; two of the same name are refused, as their draws would be equal.

    Args:
        configs: the data sets.
        unit: what a pass counts.
        storage: how to reach those behind addresses.
        listings: what `read_listings` gave for them; None reads them here.

    Raises:
        ShardError: no data set there.
        PlanError: a data set has no samples of the kind asked for, or none with a unit; or two sources share a name.
    """
    if listings is None:
        listings = read_listings(configs, unit, storage)
    sources = tuple(
        source
        for config, listing in zip(configs, listings, strict=True)
        for source in _open(config, unit, storage, listing)
    )
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"two sources are named {name!r}; give each its own stream.sources[].name")
    return sources


def _open(config: SourceConfig, unit: Unit, storage: Storage, listing: Listing) -> list[Source]:
    reader = _reader(config, storage, listing.info)
    kinds = [kind for kind in KINDS if reader.info.shards_of(kind)]
    wanted = [config.kind] if config.kind else kinds
    if config.kind and config.kind not in kinds:
        raise PlanError(f"{config.path} has no {config.kind} shards, only {' and '.join(kinds)}; correct its kind")
    sources = [
        Source(
            name=_name(config.name, kind, alone=len(wanted) == 1),
            kind=kind,
            reader=reader,
            shards=tuple(reader.info.shards_of(kind)),
            weight=config.weight,
            unit=unit,
            listing=listing,
        )
        for kind in wanted
    ]
    for source in sources:
        _check_not_empty(source, config)
    return sources


def _check_not_empty(source: Source, config: SourceConfig) -> None:
    if source.shape.num_samples:
        return
    num_samples = sum(shard.num_samples for shard in source.shards)
    num_excluded = sum(len(source.listing.excluded.get(shard.name, ())) for shard in source.shards)
    excluded = f", {num_excluded} of them excluded by {config.exclude}" if num_excluded else ""
    remedy = "correct the list" if num_excluded else "set another stream.unit"
    raise PlanError(
        f"source {source.name!r} has 0 {source.unit}s in its {num_samples} samples{excluded}; {remedy}, or leave the "
        "source out (stream.sources=[{path: ..., kind: ...}])"
    )


def _reader(config: SourceConfig, storage: Storage, info: DatasetInfo) -> ShardReader:
    if not is_address(config.path):
        return ShardReader(config.path, info, max_open=storage.max_open)
    if storage.cache is None:
        raise ShardError(f"{config.path} is an address, and shards are fetched into a local cache: none was given")
    return ShardReader(config.path, info, CachedFiles(config.path, storage.cache), storage.max_open)


def _name(given: str, kind: Kind, *, alone: bool) -> str:
    if not given:
        return kind
    return given if alone else f"{given}-{kind}"


def _list(config: SourceConfig, unit: Unit, storage: Storage) -> Listing:
    info = load_dataset_info(config.path, storage.fetch)
    if config.exclude is None:
        return Listing(info)
    keys = set(_exclude_list(config.exclude, storage.fetch))
    reader = _reader(config, storage, info)
    try:
        return Listing(info, *find_excluded(reader, config.exclude, keys, config.kind, unit))
    finally:
        reader.close()
        if isinstance(reader.files, CachedFiles):
            reader.files.cache.expect(())  # what is needed next is the plan's to say


def _exclude_list(place: str, fetch: FetchConfig) -> list[str]:
    try:
        # Editors of some systems begin a file with a mark, which would be part of the first key.
        return parse_exclude(read_file(place, fetch).decode("utf-8-sig"))
    except (ShardError, UnicodeDecodeError) as error:
        raise ShardError(f"{place} cannot be read as an exclude list: {error}") from error
