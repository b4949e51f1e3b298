"""What became of a planned shard, as it is noted in the ledger."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alpro_sharding.media_messages import MediaStage
from alpro_sharding.statistics import Statistics
from alpro_stream.manifest import ManifestRow, public_place
from alpro_stream.shards import ShardInfo

Stage = Literal["manifest"] | MediaStage
# These fail again for the same manifest and options, so `--retry-failed` leaves them.
SETTLED_STAGES: tuple[Stage, ...] = ("manifest", "filter")

HASHES_SUFFIX = ".hashes"
DIGESTS_SUFFIX = ".digests"
RUNNING_SUFFIX = ".running"


@dataclass(frozen=True, slots=True)
class Failure:
    """A row of the manifest that gave no sample.

    Attributes:
        line: line of the manifest, counted from 1.
        id: the row's id, when it could be read.
        media: the row's file, when it could be read.
        stage: ``manifest`` (the line), ``fetch``, ``probe`` (opening the file), ``decode`` or ``filter`` (left out on
            purpose).
        reason: one sentence.
    """

    line: int
    id: str | None
    media: str | None
    stage: Stage
    reason: str

    @classmethod
    def of_row(cls, row: ManifestRow, stage: Stage, reason: str) -> "Failure":
        """The failure of a row that could be read; its file without what may be secret in an address."""
        return cls(row.line, row.id, public_place(row.media), stage, reason)


@dataclass(frozen=True, slots=True)
class Work:
    """Who made a shard and what it took; nothing of this is in the shard.

    Attributes:
        host: name of the machine.
        wall_s: from beginning to end.
        fetch_s: sum over the files of fetching and hashing.
        decode_s: sum over the files of decoding, scaling and encoding.
        write_s: writing the tar and the index.
        text_s: counting nouns.
    """

    host: str
    wall_s: float
    fetch_s: float
    decode_s: float
    write_s: float
    text_s: float


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a planned shard.

    Attributes:
        num_rows: rows planned for it.
        shard: its description; None when every row failed.
        failures: the rows that gave no sample, in manifest order.
        nouns: noun counts of the captions of its samples.
        statistics: durations, sizes and the like of its samples.
        work: who made it; None for a shard that was found complete.
    """

    num_rows: int
    shard: ShardInfo | None
    failures: tuple[Failure, ...]
    nouns: dict[str, int]
    statistics: Statistics
    work: Work

    @property
    def num_to_retry(self) -> int:
        """Failures that another attempt might mend."""
        return sum(failure.stage not in SETTLED_STAGES for failure in self.failures)

    def to_values(self) -> dict[str, Any]:
        """Plain values that `from_values` reads."""
        return {
            "num_rows": self.num_rows,
            "shard": self.shard.model_dump(mode="json") if self.shard else None,
            "failures": [asdict(failure) for failure in self.failures],
            "nouns": dict(sorted(self.nouns.items())),
            "statistics": self.statistics.to_json(),
            "work": asdict(self.work),
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "ShardResult":
        """The inverse of `to_values`.

        Raises:
            ValueError, KeyError, TypeError: other values.
        """
        return cls(
            num_rows=values["num_rows"],
            shard=ShardInfo.model_validate(values["shard"]) if values["shard"] else None,
            failures=tuple(Failure(**failure) for failure in values["failures"]),
            nouns=values["nouns"],
            statistics=Statistics.from_json(values["statistics"]),
            work=Work(**values["work"]),
        )

    def to_json(self) -> bytes:
        """JSON that `from_json` reads."""
        return json.dumps(self.to_values(), ensure_ascii=False).encode("utf-8")

    @classmethod
    def from_json(cls, data: bytes) -> "ShardResult":
        """Reads what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: other bytes.
        """
        return cls.from_values(json.loads(data))


def read_note(path: Path) -> ShardResult | None:
    """What a worker noted of a shard; None when there is nothing that can be read."""
    try:
        return ShardResult.from_json(path.read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode_failures(failures: Iterable[tuple[str, Failure]]) -> Iterable[bytes]:
    """Lines of ``failures.jsonl``: each failure with the name of its manifest."""
    for manifest, failure in failures:
        line: dict[str, Any] = {"manifest": manifest, **asdict(failure)}
        # A row's id may hold a lone surrogate, which is one of the reasons to reject it.
        yield (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
