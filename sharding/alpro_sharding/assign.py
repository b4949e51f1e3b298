"""Which row goes to which shard: a pure function of the manifest's order, so the bytes do not depend on workers."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from alpro_stream.manifest import Kind, ManifestRow
from alpro_stream.shards.layout import shard_name

Group = tuple[str, Kind]
"""Split and kind: what the rows of a shard have in common."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to be made: rows of one split and one kind, in manifest order."""

    split: str
    kind: Kind
    number: int
    rows: tuple[ManifestRow, ...]

    @property
    def name(self) -> str:
        """The shard's name, such as ``video-000003``."""
        return shard_name(self.kind, self.number)


def plan_shards(
    rows: Iterable[ManifestRow], samples_per_shard: int, first_numbers: Mapping[Group, int] | None = None
) -> Iterator[PlannedShard]:
    """Cuts the rows of each (split, kind) into shards of `samples_per_shard` rows, the last one smaller.

    A shard is given as soon as its rows are known, so only the unfinished ones are in memory. Rows that fail later
    leave their shard smaller; they never move other rows.

    Args:
        rows: in the order of the manifest.
        samples_per_shard: rows of a shard.
        first_numbers: where the numbers of a (split, kind) begin, 0 unless given: after those of earlier manifests.
    """
    pending: dict[Group, list[ManifestRow]] = {}
    numbers: dict[Group, int] = dict(first_numbers or {})
    for row in rows:
        group = (row.split, row.kind)
        held = pending.setdefault(group, [])
        held.append(row)
        if len(held) == samples_per_shard:
            yield _take(group, pending, numbers)
    for group in sorted(group for group, held in pending.items() if held):
        yield _take(group, pending, numbers)


def _take(group: Group, pending: dict[Group, list[ManifestRow]], numbers: dict[Group, int]) -> PlannedShard:
    rows = tuple(pending[group])
    pending[group] = []
    number = numbers.get(group, 0)
    numbers[group] = number + 1
    split, kind = group
    return PlannedShard(split, kind, number, rows)
