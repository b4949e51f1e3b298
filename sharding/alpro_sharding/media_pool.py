"""Media processes beside a worker: requests go out, answers come back in order, and a hang or a crash costs one row.

Two or more processes, of which one decodes at a time: while it does, the others fetch, and the worker writes what is
finished.
"""

import math
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from alpro_sharding.media_messages import (
    MediaAnswer,
    MediaFailure,
    MediaOptions,
    MediaRequest,
    MediaStage,
    decode_message,
)
from alpro_stream.media.killable import KillableProcess, wait_for

T = TypeVar("T")
Outcome = MediaAnswer | MediaFailure | None

# A pause of the whole machine is no fault of the file: each gets a second chance in a fresh process.
_MAX_ATTEMPTS = 2
_START_S = 60.0


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
                entry.process.ask(entry.request)

    def _listen(self, entries: list[_Entry[T]]) -> None:
        """Waits until one of the processes says something or has used up its time."""
        talking, late = wait_for([entry.process for entry in entries if entry.process])
        for entry in entries:
            process = entry.process
            assert process is not None
            if process in talking:
                try:
                    outcome = process.receive()
                except (EOFError, OSError, ValueError, KeyError, TypeError):
                    self._failed(entry, f"the process that reads it {process.how_it_ended()}")
                else:
                    entry.is_done = outcome is not None
                    entry.outcome = outcome
            elif process in late:
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


class _Process(KillableProcess):
    """One media process, and the stage that it is in."""

    def __init__(self, options: MediaOptions, lock: int) -> None:
        self._limits = options.limits
        self._buffer = tempfile.TemporaryFile()  # noqa: SIM115
        super().__init__(
            "alpro_sharding.media_process", (self._buffer.fileno(), lock), options.model_dump_json().encode()
        )
        self.is_free = True
        self.stage = "start"

    def ask(self, request: MediaRequest) -> None:
        """Hands a request over; a process that has died meanwhile is replaced."""
        self.is_free = False
        self.send(request.to_bytes())
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

    def end(self) -> None:
        """Kills it; the next request starts another."""
        super().end()
        self.is_free = True

    def close(self) -> None:
        """Kills it for good."""
        self.end()
        self._buffer.close()

    def _enter(self, stage: str) -> None:
        self.stage = stage
        # Waiting for the others to decode has no limit of its own: each of them has one.
        seconds = {"start": _START_S, "fetch": self._limits.fetch_s, "wait": math.inf, "decode": self._limits.decode_s}
        self.allow(seconds[stage])
