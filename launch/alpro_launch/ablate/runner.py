"""Runs jobs, several at once, until all are done or this process is asked to end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from alpro_launch.ablate.jobs import Job
from alpro_launch.ablate.records import Record, commands_text, last_lines, read_record, write_record
from alpro_launch.ablate.schedule import State, left, next_job, remaining_s
from alpro_launch.processes import start
from alpro_stream.exit_status import DATA, INTERRUPTED, PREEMPTED
from alpro_stream.pages.numbers import duration

_POLL_S = 0.1
# For trainings, which save when they are asked to end.
_SAVING_S = 600.0
# How the message of a DivergenceError begins; other errors end with the same status.
_DIVERGED = re.compile(r"error: step \d+ cannot be used: ")


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    since: float
    record: Record


class Runner:
    """Runs jobs and keeps what is known of them.

    Args:
        jobs: each behind the one that it needs.
        found: how far they are; kept up to date.
        seconds: by stage, those that jobs took; kept up to date.
        num_at_once: jobs that run together; the cores are shared out among them.
        lock: descriptor that children inherit.
        say: prints a line.
        on_end: called after each job.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        found: dict[Job, State],
        seconds: dict[str, list[float]],
        num_at_once: int,
        lock: int,
        say: Callable[[str], None],
        on_end: Callable[[Job], None],
    ) -> None:
        self._jobs, self._found, self._seconds = jobs, found, seconds
        self._num_at_once, self._lock = num_at_once, lock
        self._say, self._on_end = say, on_end
        self._running: dict[Job, _Running] = {}

    def run(self) -> int:
        """Runs what can be run; returns 0, or a status that says how this process was asked to end."""
        asked, deadline = 0, float("inf")
        with _requests_to_end() as requests:
            while True:
                while requests:
                    asked, deadline = requests.pop(0), min(deadline, time.monotonic() + _SAVING_S)
                    self._end_all()
                if not asked:
                    self._start_what_can_be()
                if not self._running:
                    return {0: 0, signal.SIGINT: INTERRUPTED}.get(asked, PREEMPTED)
                if time.monotonic() > deadline:
                    for running in self._running.values():
                        running.process.kill()
                for job in [job for job, running in self._running.items() if running.process.poll() is not None]:
                    self._finish(job, was_asked=bool(asked))
                time.sleep(_POLL_S)

    def _start_what_can_be(self) -> None:
        while len(self._running) < self._num_at_once:
            job = next_job(self._jobs, self._found, self._running)
            if job is None:
                return
            self._start(job)

    def _start(self, job: Job) -> None:
        before, needed = read_record(job), read_record(job.after) if job.after else None
        made_from = needed.made if needed else 0.0
        is_same = before is not None and before.digest == job.digest and before.made_from == made_from
        if before and not is_same and job.output.exists():
            why = "what it needs was made anew" if before.digest == job.digest else "its settings changed"
            self._say(f"{job.title}: {why}, {job.output} is removed")
            shutil.rmtree(job.output)
        earlier_s = before.seconds if before and is_same else 0.0
        record = Record(
            digest=job.digest,
            state="started",
            made_from=made_from,
            seconds=earlier_s,
            command=commands_text(job.arguments),
        )
        write_record(job, record)
        threads = str(max(1, len(os.sched_getaffinity(0)) // self._num_at_once))
        with job.log.open("wb") as log:
            process = start(
                [sys.executable, "-m", "alpro_launch.cli", *job.arguments],
                {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches this process alone, which asks them to save.
                process_group=0,
                pass_fds=(self._lock,),
            )
        self._running[job] = _Running(process, time.monotonic(), record)
        self._say(f"{self._place(job)} start  {job.title}")

    def _finish(self, job: Job, was_asked: bool) -> None:
        running = self._running.pop(job)
        took = time.monotonic() - running.since + running.record.seconds
        status, lines = running.process.returncode, last_lines(job.log)
        record = running.record.model_copy(update={"state": "done", "seconds": took, "made": time.time()})
        if status == 0:
            self._found[job] = "done"
            self._seconds.setdefault(job.stage, []).append(took)
        elif was_asked:
            write_record(job, record.model_copy(update={"state": "started", "status": status, "made": 0.0}))
            self._say(f"{self._place(job)} ended  {job.title}, to go on later")
            return
        else:
            has_diverged = status == DATA and any(map(_DIVERGED.search, lines))
            self._found[job] = "diverged" if has_diverged else "failed"
            changes = {"state": self._found[job], "status": status, "last_lines": lines}
            record = record.model_copy(update=changes)
        write_record(job, record)
        self._tell_end(job, record)
        self._on_end(job)

    def _tell_end(self, job: Job, record: Record) -> None:
        word = "done  " if record.state == "done" else record.state
        jobs = left(self._jobs, self._found)
        seconds, is_longer = remaining_s(jobs, self._seconds, self._num_at_once)
        about = f"; {len(jobs)} left" if jobs else ""
        if seconds:
            about += f", {'at least' if is_longer else 'about'} {_plain(seconds)}"
        self._say(f"{self._place(job)} {word} {job.title} in {_plain(record.seconds)}{about}")
        if record.state != "done":
            why = f"status {record.status}" if record.status >= 0 else signal.Signals(-record.status).name
            self._say(f"    {why}, {job.log} ends with:")
            for line in record.last_lines:
                self._say(f"    | {line}")

    def _place(self, job: Job) -> str:
        return f"[{self._jobs.index(job) + 1}/{len(self._jobs)}]"

    def _end_all(self) -> None:
        for running in self._running.values():
            if running.process.poll() is None:
                running.process.terminate()


def _plain(seconds: float) -> str:
    return duration(seconds).replace("\u00a0", " ")


@contextmanager
def _requests_to_end() -> Iterator[list[int]]:
    """The signals that ask this process to end, as they come."""
    requests: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda received, _: requests.append(received)) for number in numbers]
    try:
        yield requests
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
