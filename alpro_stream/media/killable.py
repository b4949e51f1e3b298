"""Processes for work that may hang, crash or eat memory: each can be killed at any time, and leaves nothing behind.

Native decoders hold Python's lock while they loop, so no thread could end one; a process can be killed. What is large
goes through an open file without a name that both sides have, never through the connection: a process that stops in
the middle of reading or writing would hold up this one.
"""

import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from alpro_stream.stacks import take_part

_PR_SET_PDEATHSIG = 1
# Every library of the process uses one thread: it is one core.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class KillableProcess:
    """A process that runs a module of ours, started when it is first needed and again after it has ended.

    The module calls `connect` with its arguments, and gets the settings as its first message. The process ends with
    the thread that started it (Linux); the next message then starts another.

    Args:
        module: full name of the module.
        descriptors: open files that the process gets; they must stay open.
        settings: its first message.

    Attributes:
        connection: what it says; there is one once something was sent.
        time_limit_s: seconds it may take for what it does now.
        deadline: when they end, on the monotonic clock.
    """

    connection: Connection

    def __init__(self, module: str, descriptors: Sequence[int], settings: bytes) -> None:
        self._module = module
        self._descriptors = tuple(descriptors)
        self._settings = settings
        self._popen: subprocess.Popen[bytes] | None = None
        self.time_limit_s = self.deadline = math.inf

    @property
    def is_running(self) -> bool:
        """Whether there is a process, and it has not ended."""
        return self._popen is not None and self._popen.poll() is None

    def send(self, message: bytes) -> bool:
        """Hands a small message over; whether a process was started for it, because there was none or it had ended."""
        is_new = not self.is_running
        if is_new:
            self._kill()
            self._start()
        with suppress(OSError):  # it died just now: the wait for its answer finds out
            self.connection.send_bytes(message)
        return is_new

    def allow(self, seconds: float) -> None:
        """Counts the time of what it does next from now on."""
        self.time_limit_s = seconds
        self.deadline = time.monotonic() + seconds

    def how_it_ended(self) -> str:
        """``was ended by signal 11`` or the like, of a process that says no more."""
        if self._popen is None:
            return "ended"
        try:
            status = self._popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "broke off the connection"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def end(self) -> None:
        """Kills it; the next message starts another."""
        self._kill()

    def _kill(self) -> None:
        if self._popen is None:
            return
        self._popen.kill()
        self._popen.wait()
        self._popen = None
        self.connection.close()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        descriptors = (theirs.fileno(), *self._descriptors)
        # The process finds our packages where this one found them: on a cluster they are not installed.
        environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module, *map(str, descriptors), str(os.getpid())],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        with suppress(OSError):
            self.connection.send_bytes(self._settings)


P = TypeVar("P", bound=KillableProcess)


def wait_for(processes: Collection[P]) -> tuple[list[P], list[P]]:
    """Waits until one of the processes says something, ends or has used up its time.

    Returns:
        Those whose connection has something to read, be it their end, and those of the others that are too late.
    """
    deadline = min(process.deadline for process in processes)
    timeout = max(0.0, deadline - time.monotonic()) if math.isfinite(deadline) else None
    readable = wait([process.connection for process in processes], timeout)
    now = time.monotonic()
    talking = [process for process in processes if process.connection in readable]
    silent = [process for process in processes if process.connection not in readable]
    return talking, [process for process in silent if now >= process.deadline]


def end_with(parent: int) -> None:
    """Has this process end with the one that started it, whose id is given: it may have ended already."""
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def connect(arguments: Sequence[str]) -> tuple[Connection, list[int]]:
    """In the process: the connection to the one that started it, and the open files that it got.

    From then on this process ends with the other one, also when a decoder hangs and nobody reads the connection.

    Args:
        arguments: those of the command line.
    """
    connection, descriptors, parent = Connection(int(arguments[0])), [*map(int, arguments[1:-1])], int(arguments[-1])
    end_with(parent)
    take_part()
    # Both reach all processes of a run at once (Ctrl-C, Slurm, deepspeed); the other one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)  # crashes are expected, and each would leave a file of all its memory
    return connection, descriptors


def limit_memory(num_bytes: int) -> None:
    """In the process: makes allocations fail beyond so many bytes of data segment."""
    _limit(resource.RLIMIT_DATA, num_bytes)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of the data at the position of an open file, which one `os.write` need not do."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    with suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(kind, (value, most))
