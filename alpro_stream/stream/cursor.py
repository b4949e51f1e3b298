"""The state of the stream, and the proof that it is read by the run that wrote it."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alpro_stream.config import differences
from alpro_stream.errors import CheckpointError

logger = logging.getLogger(__name__)

StepRange = tuple[int, int]
"""Planned steps from the first number up to the second, which is not one of them."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of a run: what was committed by the optimizer, not what was fetched.

    Attributes:
        step: planned steps that lie behind: the run goes on with this one.
        skipped: those of them that were left out on purpose (`stream.skip_steps`), in order.
    """

    step: int
    skipped: tuple[StepRange, ...] = ()

    def after(self, step: int) -> "Cursor":
        """The position once a planned step is committed; the steps before it that were not are skipped ones."""
        left_out = ((self.step, step),) if step > self.step else ()
        return Cursor(step + 1, self.skipped + left_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"step": self.step, "skipped": [list(steps) for steps in self.skipped]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cursor":
        """Reads what `to_dict` wrote."""
        return cls(int(values["step"]), tuple((int(first), int(stop)) for first, stop in values.get("skipped", ())))


def steps_left(first: int, stop: int, skip_steps: Sequence[StepRange]) -> Iterator[int]:
    """The planned steps from `first` up to `stop` (not included) that no range of `skip_steps` holds, in order."""
    step = first
    while step < stop:
        # A range may end where the next one begins.
        ends = [end for begin, end in skip_steps if begin <= step < end]
        if ends:
            step = max(ends)
        else:
            yield step
            step += 1


def already_trained(cursor: Cursor, skip_steps: Sequence[StepRange]) -> list[StepRange]:
    """Those ranges that come too late: the run has made some of their steps."""
    return [
        (first, stop) for first, stop in skip_steps if num_steps_left(first, min(stop, cursor.step), cursor.skipped)
    ]


def num_steps_left(first: int, stop: int, skip_steps: Sequence[StepRange]) -> int:
    """How many steps `steps_left` gives."""
    num_left, step = 0, first
    for begin, end in sorted(skip_steps):
        num_left += max(0, min(begin, stop) - step)
        step = max(step, end)
    return num_left + max(0, stop - step)


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], where: str, accept: Collection[str] = ()
) -> None:
    """Refuses to go on with other data or another model than the run began with.

    Args:
        saved: of the checkpoint.
        current: of this run.
        where: the checkpoint, for the message.
        accept: dotted names of values that may differ, each with all that is below it; a warning names them.

    Raises:
        CheckpointError: lists every other value that differs, saved against current.
    """
    changed = differences(dict(saved), dict(current))
    accepted = [line for line in changed if _is_below(line.partition(":")[0], accept)]
    refused = [line for line in changed if line not in accepted]
    if refused:
        names = ", ".join(line.partition(":")[0] for line in refused)
        raise CheckpointError(
            f"{where} was written by another run (saved != now): {'; '.join(refused)}. Set these back, start a new run "
            f"in another directory, or, knowing that the run is then no longer one, accept=[{names}]"
        )
    if accepted:
        logger.warning("going on from %s with other data than before (saved != now): %s", where, "; ".join(accepted))


def _is_below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
