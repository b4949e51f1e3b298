"""Exchanges with the store of the first rank, each with a deadline of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")

_ANSWER_S = 5.0


def open_store(address: str, port: int, is_host: bool, timeout_s: float, seconds: float) -> Store:
    """The store of the first rank.

    Args:
        address: where it is.
        port: on which it listens.
        is_host: whether this process is the first rank.
        timeout_s: of the process group that is made with it.
        seconds: to open it.

    Raises:
        RuntimeError: of torch, when it cannot be made.
        TimeoutError: what listens there does not answer.
    """
    timeout = timedelta(seconds=timeout_s)
    return in_time(lambda: TCPStore(address, port, None, is_host, timeout, wait_for_workers=False), seconds)


def in_time(call: Callable[[], T], seconds: float = _ANSWER_S) -> T:
    """What a call of the store gives.

    In a thread: torch reads from the first rank without a deadline, also behind its own ones, and the main thread would
    not hear of a signal meanwhile, such as the request to end.

    Raises:
        RuntimeError: of torch.
        TimeoutError: there is no answer.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="alpro-rendezvous", daemon=True).start()
    return answer.result(timeout=seconds)


def wait(store: Store, keys: list[str], seconds: float) -> None:
    """Until the store has all keys.

    Raises:
        DistStoreError: it does not have them in time.
        TimeoutError: see `in_time`.
    """
    in_time(lambda: store.wait(keys, timedelta(seconds=seconds)), seconds + _ANSWER_S)


def read(store: Store, key: str, seconds: float) -> str:
    """As `wait`, for one key; its value."""
    wait(store, [key], seconds)
    return in_time(lambda: store.get(key).decode())
