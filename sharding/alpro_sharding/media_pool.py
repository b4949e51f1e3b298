"""Media processes beside a worker: requests go out, answers come back in order, and a hang or a crash costs one row.

Two or more processes, of which one decodes at a time: while it does, the others fetch, and the worker writes what is
finished.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from alpro_sharding.media_messages import (
    MediaAnswer,
    MediaFailure,
    MediaOptions,
    MediaRequest,
    MediaStage,
    decode_message,
)

T = TypeVar("T")
Outcome = MediaAnswer | MediaFailure | None

# A pause of the whole machine is no fault of the file: each gets a second chance in a fresh process.
_MAX_ATTEMPTS = 2
_START_S = 60.0
# Every library of the process uses one thread: a worker is one core.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(slots=True)
class _Entry(Generic[T]):
    """An item on its way."""

    item: T
    request: MediaRequest | None
    attempts: int = 0
    process: "_Process | None" = None
    outcome: Outcome = None
    is_done: bool = False


class MediaPool:
    """Fetches and decodes files in processes that can be killed.

    Args:
        options: how media become members.
        num_processes: processes; all but one of them fetch while that one decodes.
        one_decode: decode one file at a time; else every process decodes when it can.
    """

    def __init__(self, options: MediaOptions, num_processes: int, *, one_decode: bool = True) -> None:
        num_locks = 1 if one_decode else num_processes
        self._locks = [tempfile.TemporaryFile() for _ in range(num_locks)]  # noqa: SIM115
        self._processes = [_Process(options, self._locks[i % len(self._locks)].fileno()) for i in range(num_processes)]

    def outcomes(self, items: Iterable[tuple[T, MediaRequest | None]]) -> Iterator[tuple[T, Outcome]]:
        """The outcome of every request, in order; an item without a request passes through with None.

        The members of an answer are valid until the next one is asked for.
        """
        source, exhausted = iter(items), False
        entries: deque[_Entry[T]] = deque()
        try:
            while True:
                while not exhausted and len(entries) < 2 * len(self._processes):
                    following = next(source, None)
                    if following is None:
                        exhausted = True
                    else:
                        item, request = following
                        entries.append(_Entry(item, request, is_done=request is None))
                if not entries:
                    return
                self._hand_out(entries)
                if entries[0].is_done:
                    entry = entries.popleft()
                    try:
                        yield entry.item, entry.outcome
                    finally:
                        if entry.process is not None:
                            entry.process.is_free = True
                else:
                    self._listen([entry for entry in entries if entry.process and not entry.is_done])
        finally:
            for entry in entries:  # not all were wanted: what is under way has no reader any more
                if entry.process is not None:
                    entry.process.end()

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.close()
        for lock in self._locks:
            lock.close()

    def __enter__(self) -> "MediaPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self, entries: Iterable[_Entry[T]]) -> None:
        free = [process for process in self._processes if process.is_free]
        for entry in entries:
            if not free:
                return
            if entry.process is None and entry.request is not None:
                entry.process = free.pop()
                entry.attempts += 1
                entry.process.send(entry.request)

    def _listen(self, entries: list[_Entry[T]]) -> None:
        """Waits until one of the processes says something or has used up its time."""
        deadline = min(entry.process.deadline for entry in entries if entry.process)
        timeout = max(0.0, deadline - time.monotonic()) if math.isfinite(deadline) else None
        talking = wait([entry.process.connection for entry in entries if entry.process], timeout)
        for entry in entries:
            process = entry.process
            assert process is not None
            if process.connection in talking:
                try:
                    outcome = process.receive()
                except (EOFError, OSError, ValueError, KeyError, TypeError):
                    self._failed(entry, f"the process that reads it {process.how_it_ended()}")
                else:
                    entry.is_done = outcome is not None
                    entry.outcome = outcome
            elif time.monotonic() >= process.deadline:
                limit = "" if process.stage == "start" else f" (limits.{process.stage}_s)"
                self._failed(entry, f"it took more than {process.time_limit_s:g} s{limit}")

    def _failed(self, entry: _Entry[T], reason: str) -> None:
        process = entry.process
        assert process is not None
        stage: MediaStage = "decode" if process.stage == "decode" else "fetch"
        process.end()
        entry.process = None
        if entry.attempts >= _MAX_ATTEMPTS:
            entry.is_done, entry.outcome = True, MediaFailure(stage, f"{reason}, {entry.attempts} times")


class _Process:
    """One media process, started when it is first needed and again after it was killed."""

    def __init__(self, options: MediaOptions, lock: int) -> None:
        self._options = options
        self._lock = lock
        self._buffer = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen: subprocess.Popen[bytes] | None = None
        self.connection: Connection
        self.is_free = True
        self.stage = "start"
        self.deadline = 0.0

    @property
    def time_limit_s(self) -> float:
        """Seconds that the present stage may last."""
        limits = self._options.limits
        # Waiting for the others to decode has no limit of its own: each of them has one.
        return {"start": _START_S, "fetch": limits.fetch_s, "wait": math.inf, "decode": limits.decode_s}[self.stage]

    def send(self, request: MediaRequest) -> None:
        """Hands a request over; a process that has died meanwhile is replaced."""
        if self._popen is None or self._popen.poll() is not None:
            self.end()
            self._start()
        self.is_free = False
        with suppress(OSError):  # it died just now: the wait for its answer finds out
            self.connection.send_bytes(request.to_bytes())
        self._enter("start")

    def receive(self) -> MediaAnswer | MediaFailure | None:
        """What it says; None when that is only the beginning of another stage.

        Raises:
            EOFError, OSError: it died.
        """
        message = decode_message(self.connection.recv_bytes(), self._buffer.fileno())
        if isinstance(message, str):
            self._enter(message)
            return None
        return message

    def how_it_ended(self) -> str:
        """``was killed by signal 11`` or the like."""
        if self._popen is None:
            return "ended"
        try:
            status = self._popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "broke off the connection"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def end(self) -> None:
        """Kills it; the next request starts another."""
        self.is_free = True
        if self._popen is None:
            return
        self._popen.kill()
        self._popen.wait()
        self._popen = None
        self.connection.close()

    def close(self) -> None:
        """Kills it for good."""
        self.end()
        self._buffer.close()

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.deadline = time.monotonic() + self.time_limit_s

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        descriptors = (theirs.fileno(), self._buffer.fileno(), self._lock)
        # The process finds our packages where this one found them: on a cluster they are not installed.
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "alpro_sharding.media_process", *map(str, descriptors), str(os.getpid())],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        self.connection.send_bytes(self._options.model_dump_json().encode())
