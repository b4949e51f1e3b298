"""Starting a run again after a failure that another attempt may mend: when, after how long, and with how many ranks."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Protocol

from alpro_launch.launch_log import newest, next_number, write_line
from alpro_launch.processes import terminated_within
from alpro_stream.exit_status import HARDWARE, PREEMPTED

BEFORE_IT_BEGAN = "asked to stop before it began, or before it could save; the same command goes on where it can"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 300.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: see `alpro_stream.exit_status`.
        cause: a sentence; empty where the ranks said it themselves.
        was_asked: whether the run was asked to stop meanwhile.
    """

    status: int
    cause: str = ""
    was_asked: bool = False


class Launcher(Protocol):
    """Starts the ranks of a run, here or on other machines."""

    def num_slots(self) -> int:
        """Ranks that can be started now."""
        ...

    def launch(self, num_ranks: int) -> Outcome:
        """Starts so many, and waits until they have ended."""
        ...


@dataclass(frozen=True)
class NextAttempt:
    """What follows after an attempt.

    Attributes:
        num_ranks: of the next one; 0 when the run ends.
        wait_s: before it.
        reason: why it ends; empty where it goes on, or has nothing to go on with.
    """

    num_ranks: int
    wait_s: float = 0.0
    reason: str = ""


def allowed_ranks(num_lanes: int, num_micro_batches: int) -> list[int]:
    """The numbers of ranks that can train a run: they divide its lanes, and the micro-batches those of a rank."""
    num_cuts, left = divmod(num_lanes, num_micro_batches)
    if left:
        return []
    small = [size for size in range(1, isqrt(num_cuts) + 1) if num_cuts % size == 0]
    return sorted({*small, *(num_cuts // size for size in small)})


def back_off_s(failures: int) -> float:
    """Seconds before the next attempt, after so many failures in a row: 5, 10, 20, ... 300."""
    return float(min(_FIRST_WAIT_S * 2 ** min(failures - 1, 10), _LONGEST_WAIT_S))


def next_attempt(status: int, failures: int, max_restarts: int, num_slots: int, allowed: Sequence[int]) -> NextAttempt:
    """Decides what follows after an attempt.

    Args:
        status: that it ended with.
        failures: in a row that brought no newer checkpoint, this one included.
        max_restarts: that are made after them.
        num_slots: ranks that can be started now.
        allowed: numbers of ranks that can train the run.
    """
    if status != HARDWARE:
        return NextAttempt(0)  # done, asked to stop, or it would fail again
    if failures > max_restarts:
        return NextAttempt(0, reason=f"--max-restarts {max_restarts} is used up" if max_restarts else "")
    num_ranks = max((size for size in allowed if size <= num_slots), default=0)
    if not num_ranks:
        return NextAttempt(0, reason=f"{num_slots} ranks are left, and the run needs one of {_list(allowed)}")
    return NextAttempt(num_ranks, back_off_s(failures))


def keep_training(
    launcher: Launcher, num_ranks: int, allowed: Sequence[int], max_restarts: int, run_dir: Path, is_logged: bool = True
) -> Outcome:
    """Starts a run, and starts it again as long as that may help; returns how the last attempt ended.

    Args:
        launcher: of the ranks.
        num_ranks: of the first attempt.
        allowed: numbers of ranks that can train the run.
        max_restarts: in a row without a newer checkpoint.
        run_dir: folder of the run.
        is_logged: whether this process writes the log of the attempts.
    """
    failures = 0
    while True:
        begun_from, started = newest(run_dir), time.time()
        outcome = launcher.launch(num_ranks)
        ended_at = newest(run_dir)
        failures = failures + 1 if ended_at == begun_from else 1
        # Who asked it to stop does not want it again, also when it failed over that.
        limit = 0 if outcome.was_asked else max_restarts
        slots = launcher.num_slots() if outcome.status == HARDWARE and failures <= limit else 0
        following = next_attempt(outcome.status, failures, limit, slots, allowed)
        if is_logged:
            number = next_number(run_dir)
            write_line(
                run_dir,
                {
                    "attempt": number,
                    "time": started,
                    "seconds": round(time.time() - started, 1),
                    "ranks": num_ranks,
                    "begun_from": begun_from,
                    "ended_at": ended_at,
                    **asdict(outcome),
                    "next_ranks": following.num_ranks,
                },
            )
        tell(outcome)
        if following.reason:
            _say(f"error: {following.reason}")
        if not following.num_ranks:
            return outcome
        _say(
            f"starting again in {following.wait_s:g} s with {following.num_ranks} ranks, from "
            f"{ended_at or 'the beginning'} (allowed numbers of ranks: {_list(allowed)})"
        )
        if terminated_within(following.wait_s):
            if is_logged:
                write_line(run_dir, {"attempt": number, "was_asked": True, "next_ranks": 0})
            asked = Outcome(PREEMPTED, "asked to stop while it waited to start again; the same command goes on", True)
            tell(asked)
            return asked
        num_ranks = following.num_ranks


def tell(outcome: Outcome) -> None:
    """Prints why an attempt ended, unless the ranks have said it."""
    if outcome.cause:
        _say(outcome.cause if outcome.status == PREEMPTED else f"error: {outcome.cause}")


def _say(text: str) -> None:
    with suppress(OSError):  # A terminal that is gone is no reason to end a run.
        print(text, file=sys.stderr, flush=True)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
