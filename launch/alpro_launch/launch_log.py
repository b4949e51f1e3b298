"""The log of a run's attempts, which spans its restarts: `alpro train` writes it, in a job of Slurm the first rank."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from alpro_stream.exit_status import INTERRUPTED, PREEMPTED, status_of

LAUNCH_LOG = Path("logs/launch.jsonl")
"""In the folder of a run: a line for each attempt, or one for its beginning and one for its end."""


def read_launch_log(run_dir: Path) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first; a line that a full disk or a kill cut off is left out."""
    path = run_dir / LAUNCH_LOG
    attempts: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            line = json.loads(text)
            attempts.setdefault(line["attempt"], {}).update(line)
    return list(attempts.values())


def next_number(run_dir: Path) -> int:
    """Of the attempt that follows."""
    return max((attempt["attempt"] for attempt in read_launch_log(run_dir)), default=0) + 1


def write_line(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Adds a line, of the attempt that it names."""
    path = run_dir / LAUNCH_LOG
    # A full disk is among the reasons to start again.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def newest(run_dir: Path) -> str | None:
    """Name of the newest complete checkpoint."""
    # Imported here: torch takes seconds, which who never starts again need not wait for.
    from alpro_stream.train.checkpoint import complete_checkpoints

    found = complete_checkpoints(run_dir)
    return found[-1].name if found else None


def logged_in_slurm(run_dir: Path, num_ranks: int, environment: Mapping[str, str], work: Callable[[], int]) -> int:
    """Does the work of the first rank, and writes what no command above the ranks is there to write.

    The beginning is a line of its own: a node that is lost takes the batch script with it.

    Args:
        run_dir: folder of the run.
        num_ranks: of this attempt.
        environment: with Slurm's variables.
        work: gives the exit status, or raises.
    """
    number, started = next_number(run_dir), time.time()
    begun = {"attempt": number, "time": started, "ranks": num_ranks, "begun_from": newest(run_dir)}
    job = {"job": environment["SLURM_JOB_ID"], "requeued": int(environment.get("SLURM_RESTART_COUNT") or 0)}
    write_line(run_dir, {**begun, **job})

    def write_end(status: int) -> None:
        seconds = round(time.time() - started, 1)
        write_line(run_dir, {"attempt": number, "seconds": seconds, "ended_at": newest(run_dir), "status": status})

    end_at_once = signal.getsignal(signal.SIGTERM)

    # Until the ranks have met; from then on who is asked to stop saves, and comes back from the work.
    if callable(end_at_once):

        def end(number: int, frame: FrameType | None) -> None:
            write_end(PREEMPTED)
            end_at_once(number, frame)

        signal.signal(signal.SIGTERM, end)
    try:
        status = work()
    except BaseException as error:
        write_end(INTERRUPTED if isinstance(error, KeyboardInterrupt) else status_of(error))
        raise
    write_end(status)
    return status
