"""Sources: the shards of one kind of one data set, opened for reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import PlanError, ShardError
from alpro_stream.manifest import KINDS, Kind
from alpro_stream.shards.layout import ShardInfo
from alpro_stream.shards.reader import ShardReader
from alpro_stream.stream.plan import SourceShape


class SourceConfig(Config):
    """Samples of one data set."""

    path: Path
    """The directory of a split: the one that holds dataset.json."""
    kind: Kind | None = None
    """Which of its shards; null makes a source of each kind it has, as a batch holds one kind only (published)."""
    name: str = ""
    """Part of every seed; the kind when it is left empty, and ``name-kind`` when one name covers both kinds."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the steps under `mix: weights`."""


@dataclass(frozen=True)
class Source:
    """One kind of sample of one data set: the reader and the shards of that kind, in the order of the data set."""

    name: str
    kind: Kind
    reader: ShardReader
    shards: tuple[ShardInfo, ...]
    weight: float

    @property
    def shape(self) -> SourceShape:
        """What the plan needs to know."""
        return SourceShape(self.name, tuple(shard.num_samples for shard in self.shards), self.weight)

    @property
    def stored_size(self) -> int:
        """Side of the stored frames, pixels.

        Raises:
            ShardError: the data set does not say.
        """
        size = _frame_options(self.reader).get("size")
        if not isinstance(size, int):
            raise ShardError(
                f"{self.reader.directory}: dataset.json has no options.frames.size, the side of the stored frames in "
                "pixels; add it, or set stream.crop_scale=1 to use whole frames"
            )
        return size


def open_sources(configs: Sequence[SourceConfig]) -> tuple[Source, ...]:
    """Opens all sources; two of the same name are refused, as their draws would be equal.

    Raises:
        ShardError: no data set there.
        PlanError: a data set has no samples of the kind asked for, or two sources share a name.
    """
    sources = tuple(source for config in configs for source in _open(config))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"two sources are named {name!r}; give each its own stream.sources[].name")
    return sources


def _open(config: SourceConfig) -> list[Source]:
    reader = ShardReader(config.path)
    _refuse_other_payloads(reader)
    kinds = [kind for kind in KINDS if reader.info.shards_of(kind)]
    wanted = [config.kind] if config.kind else kinds
    if config.kind and config.kind not in kinds:
        raise PlanError(f"{config.path} has no {config.kind} shards, only {' and '.join(kinds)}; correct its kind")
    return [
        Source(
            name=_name(config.name, kind, alone=len(wanted) == 1),
            kind=kind,
            reader=reader,
            shards=tuple(reader.info.shards_of(kind)),
            weight=config.weight,
        )
        for kind in wanted
    ]


def _name(given: str, kind: Kind, *, alone: bool) -> str:
    if not given:
        return kind
    return given if alone else f"{given}-{kind}"


def _frame_options(reader: ShardReader) -> dict[str, Any]:
    options = reader.info.options.get("frames")
    return options if isinstance(options, dict) else {}


def _refuse_other_payloads(reader: ShardReader) -> None:
    payload = reader.info.options.get("payload", "frames")
    if payload != "frames":
        raise ShardError(
            f"{reader.directory} holds whole videos (payload={payload}), and training reads stored frames only; "
            "shard the corpus with payload=frames"
        )
    resize = _frame_options(reader).get("resize", "square")
    if resize != "square":
        raise ShardError(
            f"{reader.directory} holds frames that are not square (frames.resize={resize}), and training reads "
            "square ones only; shard the corpus with frames.resize=square"
        )
