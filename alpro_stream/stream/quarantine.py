"""Samples that could not be used: what took their place, how many are too many, and the record that repeats it.

A decoder that took too long on one day may not on another. So each failure is written down the moment it happens, in
``RUN/quarantine/rank-N.jsonl`` and with every checkpoint, and a run that goes on takes it from there: the same samples
are left out of the same steps, whatever they would do now.
"""

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import Cause, DataError, SampleError

logger = logging.getLogger(__name__)

RECORD_FOLDER = "quarantine"
RECORD_FILE = "quarantine.jsonl"
_WINDOW = 1000
_EXAMPLES = 3


class Occurrence(NamedTuple):
    """Where a run met a sample.

    The same sample at another place is tried anew, so that what a place gets depends on nothing else, whichever rank
    has it.

    Attributes:
        step: planned step.
        row: place in the global batch.
        shard: name of the shard.
        unit: in the shard.
    """

    step: int
    row: int
    shard: str
    unit: int


class QuarantineConfig(Config):
    """How many unusable samples a run endures. Each is replaced by one that its pass would have left over."""

    max_rate: float = Field(default=0.05, ge=0, le=1)
    """Share of unusable samples at which a run stops: of the last 1,000 samples of a rank, or of 1,000 when there were
    fewer."""
    max_consecutive: int = Field(default=64, ge=1)
    """Unusable samples of a rank in a row at which a run stops."""


class QuarantineError(DataError):
    """Too many samples of a run cannot be used."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample that could not be used where a run met it.

    Attributes:
        occurrence: where.
        source: its name.
        data: digest of what the source holds, see `Source.content`.
        pass_index: of the source.
        place: ``shard:slot key``.
        cause: a word to count by.
        reason: a sentence.
        substitute: ``shard:slot key`` of the sample in its place; None where nothing was left over, and the place in
            the batch is masked out of every loss.
    """

    occurrence: Occurrence
    source: str
    data: str
    pass_index: int
    place: str
    cause: Cause
    reason: str
    substitute: str | None

    def to_json(self) -> str:
        """One line; `id`, `media`, `stage` and `reason` are those of the sharding's failures.jsonl."""
        media, _, key = self.place.partition(" ")
        values = {
            "id": key,
            "media": media,
            "stage": self.cause,
            "reason": self.reason,
            "substitute": self.substitute,
            "source": self.source,
            "data": self.data,
            "pass": self.pass_index,
            **self.occurrence._asdict(),
        }
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Failure":
        """Reads a line of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        values = json.loads(line)
        return cls(
            occurrence=Occurrence(int(values["step"]), int(values["row"]), values["shard"], int(values["unit"])),
            source=values["source"],
            data=values["data"],
            pass_index=int(values["pass"]),
            place=f"{values['media']} {values['id']}",
            cause=values["stage"],
            reason=values["reason"],
            substitute=values["substitute"],
        )


class Quarantine:
    """The failures of one rank; used by one thread at a time.

    Args:
        config: how many are too many.
        rank: of this process, for messages and the name of its record.
        folder: gets the record; None keeps none, as for a look at single batches.
        known: failures of earlier sittings that this one goes on from.
        data: `Failure.data` of each source as it is now; what was written down of other data counts no more. None takes
            all that is known.
    """

    def __init__(
        self,
        config: QuarantineConfig,
        rank: int = 0,
        folder: Path | None = None,
        known: Iterable[Failure] = (),
        data: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._rank = rank
        self._known = {f.occurrence: f for f in known if data is None or data.get(f.source) == f.data}
        self._latest: deque[SampleError | None] = deque(maxlen=_WINDOW)
        self._num_consecutive = 0
        self._file: IO[str] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"rank-{rank:05d}.jsonl"
            _drop_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8")

    def recall(self, occurrence: Occurrence) -> SampleError | None:
        """What became of a sample when an earlier run met it at the same place; None where nothing is known."""
        failure = self._known.get(occurrence)
        return None if failure is None else SampleError(failure.place, failure.cause, failure.reason)

    def record(self, failure: Failure) -> None:
        """Writes a failure down, unless it was taken from the record."""
        if failure.occurrence in self._known:
            return
        self._known[failure.occurrence] = failure
        if self._file is not None:
            try:
                self._file.write(failure.to_json() + "\n")
                self._file.flush()
            except OSError as error:
                # Without it, a run that goes on could make other batches than this one.
                raise DataError(
                    f"the record of unusable samples {self._file.name} cannot be written: {error.strerror or error}; "
                    "make room there, and run the same command again"
                ) from error

    def count(self, error: SampleError | None) -> None:
        """Counts a planned sample, called in their order; None is one that can be used.

        Raises:
            QuarantineError: too many of them cannot.
        """
        self._latest.append(error)
        if error is None:
            self._num_consecutive = 0
            return
        self._num_consecutive += 1
        if self._num_consecutive >= self._config.max_consecutive:
            latest = list(self._latest)[-self._num_consecutive :]
            raise self._too_many(f"{self._num_consecutive} samples in a row", "max_consecutive", latest)
        num_failed = sum(latest is not None for latest in self._latest)
        if num_failed > self._config.max_rate * _WINDOW:
            raise self._too_many(f"{num_failed} of the last {len(self._latest)} samples", "max_rate", self._latest)

    def close(self) -> None:
        """Closes the record."""
        if self._file is not None:
            self._file.close()

    def _too_many(self, how_many: str, setting: str, latest: Iterable[SampleError | None]) -> QuarantineError:
        errors = [error for error in latest if error is not None]
        causes = ", ".join(f"{cause} {count}" for cause, count in Counter(e.cause for e in errors).most_common())
        examples = "; ".join(str(error) for error in errors[-_EXAMPLES:])
        where = f" All are listed in {self._file.name}." if self._file else ""
        return QuarantineError(
            f"{how_many} of rank {self._rank} cannot be used ({causes}), at most "
            f"stream.quarantine.{setting}={getattr(self._config, setting)} is set. The latest: {examples}.{where} Look "
            "at the data set with `alpro inspect DATASET --verify`, shard what is damaged again or exclude it, or set "
            f"stream.quarantine.{setting} higher; the same command then goes on"
        )


def read_failures(folder: Path) -> list[Failure]:
    """Every failure that the ranks of a run, in one sitting or several, wrote down in ``RUN/quarantine``."""
    return [failure for path in sorted(folder.glob("rank-*.jsonl")) for failure in read_record(path)]


def read_record(path: Path) -> list[Failure]:
    """The failures of one file; an unfinished last line (of a killed run) is left out, as is one that is damaged."""
    failures = []
    # By line feeds alone: a reason may hold other characters that Python takes for line breaks.
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else ():
        try:
            failures.append(Failure.from_json(line))
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a line cannot be read, and is left out: %.100s", path, line)
    return failures


def summary(failures: Iterable[Failure]) -> Mapping[str, Any]:
    """Numbers for a checkpoint: planned samples that could not be used, by cause, and those that are masked."""
    # Substitutes that cannot be used either are written down behind the planned sample, with its step and row.
    planned: dict[tuple[int, int], Failure] = {}
    for failure in failures:
        planned.setdefault((failure.occurrence.step, failure.occurrence.row), failure)
    return {
        "num": len(planned),
        "by_cause": dict(Counter(failure.cause for failure in planned.values()).most_common()),
        "num_masked": sum(failure.substitute is None for failure in planned.values()),
    }


def describe(failures: Iterable[Failure], folder: Path) -> str:
    """What became of a run's unusable samples, in a line."""
    values = summary(failures)
    causes = ", ".join(f"{cause} {count}" for cause, count in values["by_cause"].items())
    return (
        f"quarantine: {values['num']} times a sample could not be used ({causes}), {values['num_masked']} times "
        f"without a substitute; all are listed in {folder}"
    )


def _drop_unfinished_line(path: Path) -> None:
    if not path.is_file():
        return
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
