"""Clocks that several benchmarks share."""

import functools
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_BLOCK_BYTES = 8 * 2**20


def matrix_product_rate(
    size: int = 1024, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", count: int = 12
) -> float:
    """Floating point operations a second of a plain matrix product, with torch's threads; the median of `count`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / statistics.median(repeat(lambda: torch.mm(a, b), count))


def copy_rate(num_bytes: int, count: int = 12) -> float:
    """Bytes a second that a plain copy in memory moves, with torch's threads; each is read once and written once."""
    source = torch.ones(max(1, num_bytes), dtype=torch.uint8)
    target = torch.empty_like(source)
    return len(source) / statistics.median(repeat(lambda: target.copy_(source), count))


def loopback_rate(num_bytes: int, count: int = 8) -> float:
    """Bytes a second through a TCP connection within this machine, in one direction; the median of `count`."""
    block, received = bytes(num_bytes), bytearray(num_bytes)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver, ThreadPoolExecutor(1) as sending:

            def pass_on() -> None:
                sent = sending.submit(sender.sendall, block)
                left = memoryview(received)
                while left:
                    left = left[receiver.recv_into(left) :]
                sent.result()

            return num_bytes / statistics.median(repeat(pass_on, count))


def write_seconds(path: Path, num_bytes: int) -> float:
    """Seconds in which as many bytes of memory are written to a new file and are on the disk (fsync)."""
    block = memoryview(os.urandom(min(num_bytes, _BLOCK_BYTES)))
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = num_bytes
        while left:
            left -= file.write(block[:left])
        os.fsync(file.fileno())
    return time.perf_counter() - started


def read_seconds(paths: Sequence[Path]) -> float:
    """Seconds in which files are read whole, block by block, and dropped."""
    block = bytearray(_BLOCK_BYTES)
    started = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - started


def wait_for_device() -> None:
    """Returns when the GPU, if there is one, has done what it was given: it works behind the program."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Times every call of some methods while it is entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.kept: dict[str, list[Any]] = {}
        self._stack = ExitStack()

    def on(self, owner: type | ModuleType, method: str, name: str, keep: bool = False) -> None:
        """Records the calls of a method, or of a module's function, under a name; keeps what it returns if asked to."""
        seconds, kept = self.seconds.setdefault(name, []), self.kept.setdefault(name, [])
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*arguments: Any, **named: Any) -> Any:
            wait_for_device()
            started = time.perf_counter()
            result = original(*arguments, **named)
            wait_for_device()
            seconds.append(time.perf_counter() - started)
            if keep:
                kept[:] = [result]
            return result

        setattr(owner, method, timed)
        self._stack.callback(setattr, owner, method, original)

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def repeat(work: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls, after one that does not count."""
    work()
    seconds = []
    for _ in range(count):
        wait_for_device()
        started = time.perf_counter()
        work()
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    return seconds
