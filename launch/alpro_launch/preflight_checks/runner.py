"""Runs checks on all ranks at the same time, each within its seconds: one that fails or hangs is a line like others."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from alpro_launch.preflight_checks.lines import Line, Verdict, counted
from alpro_stream.errors import AlproError, Fault
from alpro_stream.exit_status import fault_of
from alpro_stream.train.distributed import World

T = TypeVar("T")

# For a rank whose processor is taken, or that closes what it has opened.
_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank has no result.

    Attributes:
        text: what was found.
        fault: where to look.
        is_late: whether it is still at it.
    """

    text: str
    fault: Fault
    is_late: bool = False


class Runner:
    """Runs one check after the other; every method is called on all ranks.

    What the ranks tell each other about a check goes through a group of its own: a check that hangs may hang in the
    others. It is in a thread, which is then left behind.

    Args:
        world: the ranks.
        hosts: of the ranks, by rank.
        seconds: for everything together.
        since: when they begin, by `time.monotonic`; None is now.

    Attributes:
        lines: what was found so far, the same on every rank.
    """

    def __init__(self, world: World, hosts: Sequence[str], seconds: float, since: float | None = None) -> None:
        self.lines: list[Line] = []
        self.was_late = False
        self._world, self._hosts, self._total_s = world, hosts, seconds
        self._started, self._elapsed_s = time.monotonic() if since is None else since, 0.0
        self._out_of_step = ""
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def run(
        self,
        check: str,
        seconds: float,
        measure: Callable[[], T],
        judge: Callable[[list[T]], Sequence[Line]],
        *,
        together: bool = False,
        late: Verdict = "FAIL",
    ) -> bool:
        """Measures on every rank, tells all ranks, and adds what they found to the lines.

        Args:
            check: its name.
            seconds: longest duration on a rank.
            measure: of this rank; what it gives is pickled.
            judge: a pure function of what all ranks gave, by rank.
            together: whether the ranks wait for each other in `measure`.
            late: verdict where a rank is not done in time.

        Returns:
            Whether every rank has a result.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        seconds = min(seconds, self._total_s - self._elapsed_s)
        if seconds <= 0:
            return self.leave_out(check, f"the {self._total_s:g} s of a preflight were over")
        if together and self._out_of_step:
            return self.leave_out(check, f"the ranks are out of step since the check of {self._out_of_step}")
        self._world.stage.enter(f"the check of {check}")
        until = time.monotonic() + seconds
        outcomes = self._tell(check, _within(seconds, measure, self._world.device), until)
        failures = {rank: one for rank, one in enumerate(outcomes) if isinstance(one, Failure)}
        if not failures:
            self.lines += judge(outcomes)
            return True
        self.lines.append(failed_line(check, failures, self._hosts, late))
        self.was_late = self.was_late or any(failure.is_late for failure in failures.values())
        if together and any(failure.is_late for failure in failures.values()):
            self._out_of_step = check
        return False

    def leave_out(self, check: str, reason: str) -> bool:
        """A line for a check that cannot be made."""
        self.lines.append(Line(check, "not checked", reason, "warn", "mend what is above, and run it again"))
        return False

    def wait_for_all(self) -> None:
        """Until all ranks are here; they are whatever their checks still do."""
        self._tell("the end", None, time.monotonic())

    def _tell(self, check: str, outcome: Any, until: float) -> list[Any]:
        """What all ranks found; the one that took longest says how much time is left.

        Ranks come here a little after `until`, whatever they found: who does not has ended, or stands still.
        """
        told: list[Any] = [(outcome, time.monotonic() - self._started)] * self._world.size
        if self._group:
            c10d._set_pg_timeout(timedelta(seconds=max(0.0, until - time.monotonic()) + _GRACE_S), self._group)
            with self._world.waiting(f"what all ranks found in the check of {check}"):
                dist.all_gather_object(told, told[0], group=self._group)
        self._elapsed_s = max(elapsed for _, elapsed in told)
        return [found for found, _ in told]


def failed_line(check: str, failures: dict[int, Failure], hosts: Sequence[str], late: Verdict) -> Line:
    """The line of a check that some ranks have no result of.

    A rank that waited for another one that failed has only that to say: the first one with something else speaks.
    """
    rank, failure = min(failures.items(), key=lambda item: (item[1].is_late, item[1].text.startswith("rank "), item[0]))
    others = len(failures) - 1
    more = f" (and {counted(others, 'other rank')})" if others else ""
    text = f"rank {rank} on {hosts[rank]}: {failure.text}{more}" if len(hosts) > 1 else failure.text
    remedy = "see what it waits for there, or how it fares in the run itself" if failure.is_late else "as it says"
    return Line(check, text, "", late if failure.is_late else "FAIL", remedy, failure.fault)


def _within(seconds: float, measure: Callable[[], T], device: torch.device) -> T | Failure:
    results: list[T | Failure] = []

    def work() -> None:
        if device.type == "cuda":  # Each thread has a current device of its own.
            torch.cuda.set_device(device)
        try:
            results.append(measure())
        except Exception as error:
            text = str(error) if isinstance(error, AlproError | OSError) else f"{type(error).__name__}: {error}"
            failure = Failure(text, fault_of(error))
            if failure.fault == "bug":
                traceback.print_exc()
            results.append(failure)

    thread = threading.Thread(target=work, name="alpro-preflight", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else Failure(f"not done after {seconds:.0f} s", "hardware", is_late=True)
