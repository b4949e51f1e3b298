"""Runs a process with a journal until it is done or its time is over, past parts that hang or crash."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from alpro_launch.processes import ended_by
from benchmarks.gpu_pieces.journal import Journal, Outcome

_POLL_S = 0.1
_GRACE_S = 3.0
_MOST_STARTS = 8
INTERRUPTED = "interrupted"
"""Why a part was left out that this process was asked to end before."""


def work_through(
    command: Sequence[str],
    journal: Journal,
    log: Path,
    seconds: float,
    stall_s: float,
    environment: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Runs a command that keeps a journal; where a part hangs or ends the process, again with the parts behind it.

    Args:
        command: of the process.
        journal: that it keeps.
        log: file for what it prints, added to what is there.
        seconds: for everything.
        stall_s: longest time without a new line in the journal.
        environment: of the process; by default this one's.

    Returns:
        An outcome for each part, in the order of the parts; for the whole, under the name of the journal's file, where
        no part was announced.
    """
    deadline = time.monotonic() + seconds
    for _ in range(_MOST_STARTS):
        num_done = len(journal.read().outcomes)
        why = _run(command, journal, log, deadline, stall_s, environment)
        record = journal.read()
        if not record.names:
            return [Outcome(name=journal.path.stem, state="failed", why=why or "it ended without doing anything")]
        if record.running is not None:
            journal.end(record.running, "failed", why or "the process ended in the middle of it")
        elif why and record.left and len(record.outcomes) == num_done:
            # It did not get to its first part, and would not the next time.
            journal.end(record.left[0], "failed", f"before it began, the process {why}")
        if not why or not journal.read().left or time.monotonic() >= deadline:
            break
    is_over = time.monotonic() >= deadline
    for name in journal.read().left:
        if is_over:
            journal.end(name, "left out", "no time")
        else:
            journal.end(name, "failed", "the process ended before it")
    return _in_order(journal)


def broken_off(journal: Journal) -> list[Outcome]:
    """The outcomes of a command that was ended with this process; what it did not get to is left out."""
    record = journal.read()
    if not record.names:
        return [Outcome(name=journal.path.stem, state="left out", why=INTERRUPTED)]
    for name in [*([record.running] if record.running else []), *record.left]:
        journal.end(name, "left out", INTERRUPTED)
    return _in_order(journal)


def _in_order(journal: Journal) -> list[Outcome]:
    record = journal.read()
    places = {name: place for place, name in enumerate(record.names)}
    return sorted(record.outcomes, key=lambda outcome: places.get(outcome.name, len(places)))


def _run(
    command: Sequence[str],
    journal: Journal,
    log: Path,
    deadline: float,
    stall_s: float,
    environment: Mapping[str, str] | None,
) -> str:
    """Runs to the end; gives why it did not get there by itself, or how it went wrong."""
    started = time.monotonic()
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now >= deadline:
                    return f"was not done when its time was over, after {now - started:.0f} s"
                if _quiet_s(journal.path, now - started) > stall_s:
                    return f"was given up after {stall_s:g} s"
                time.sleep(_POLL_S)
        finally:
            _end(process)
    if process.returncode == 0:
        return ""
    if process.returncode < 0:
        return ended_by(-process.returncode)
    return f"ended with status {process.returncode}: {_last_line(log, start)}"


def _quiet_s(path: Path, running_s: float) -> float:
    """Seconds since the last line, or since the process was started."""
    return min(running_s, time.time() - path.stat().st_mtime) if path.is_file() else running_s


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started, which form a group of their own."""
    for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_line(log: Path, start: int) -> str:
    """The last thing that was said since a place in the file."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")
