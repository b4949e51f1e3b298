"""Threads of the shard cache, which a silent server may keep: nobody waits for them longer than they want to."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


class StoppedError(Exception):
    """The cache was stopped meanwhile."""


class Threads:
    """Starts threads and keeps those that run.

    Args:
        changed: told when a thread ends, and when the cache is stopped.
        stopped: whether it is.
    """

    def __init__(self, changed: threading.Condition, stopped: threading.Event) -> None:
        self._changed, self._stopped = changed, stopped
        self._running: set[threading.Thread] = set()

    def start(self, work: Callable[[], None], name: str) -> None:
        """Runs `work` on a thread."""

        def run() -> None:
            try:
                work()
            finally:
                with self._changed:
                    self._running.discard(thread)
                    self._changed.notify_all()

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._changed:
            self._running.add(thread)
            thread.start()

    def run(self, work: Callable[[], Result], name: str) -> Result:
        """Runs `work` on a thread and waits for it; gives what it gives.

        Raises:
            StoppedError: the cache was stopped; the thread is left to end by itself.
        """
        result: Future[Result] = Future()

        def keep_result() -> None:
            try:
                result.set_result(work())
            except BaseException as error:  # for the thread that waits, whatever it is
                result.set_exception(error)

        self.start(keep_result, name)
        with self._changed:
            self._changed.wait_for(lambda: result.done() or self._stopped.is_set())
        if not result.done():
            raise StoppedError
        return result.result()

    def join(self, seconds: float) -> None:
        """Waits until all have ended, at most so long."""
        until = time.monotonic() + seconds
        for thread in list(self._running):
            thread.join(max(0.0, until - time.monotonic()))
