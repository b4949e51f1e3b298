"""Child processes that never outlive their parent."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG = 1
_GRACE_S = 20
# For those that save when they are asked to end.
_SAVING_S = 600
_POLL_S = 0.1


class Ended(NamedTuple):
    """How processes ended.

    Attributes:
        status: 0 when all ended well; else that of the one that did not, minus the signal that killed it.
        number: of that one.
        was_asked: whether this process got SIGTERM meanwhile, or before, where that was noted.
    """

    status: int
    number: int = 0
    was_asked: bool = False


def how_ended(ended: Ended) -> str:
    """What to tell of a rank that a signal ended."""
    return f"rank {ended.number} of this machine {ended_by(-ended.status)}"


def ended_by(number: int) -> str:
    """What to tell of a process that a signal ended."""
    name = signal.Signals(number).name
    return f"was ended by {name}{' (out of memory, perhaps)' if name == 'SIGKILL' else ''}"


class _Noted(list[int]):
    """A handler that keeps the numbers of its signals."""

    def __call__(self, number: int, _: object) -> None:
        self.append(number)


@contextmanager
def noting_requests() -> Iterator[Sequence[int]]:
    """Notes each SIGTERM to this process, which does not end it then; inside of another one, together with that."""
    before = signal.getsignal(signal.SIGTERM)
    noted = before if isinstance(before, _Noted) else _Noted()
    signal.signal(signal.SIGTERM, noted)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)) -> int:
    """As `run_all`; returns the status alone."""
    return run_all(command, environments).status


def run_all(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]] = ({},),
    ask_to_end: Callable[[], None] | None = None,
    saving_s: float = _SAVING_S,
    grace_s: float = _GRACE_S,
) -> Ended:
    """Runs a command once for each environment, all at the same time, to the end.

    Ctrl-C reaches the children too, as they belong to the terminal's group: they are given time to end by themselves.
    SIGTERM is handed on to them, once, and they are waited for; also one that `noting_requests` noted before. When this
    process is killed, the kernel ends them.

    Args:
        command: with its arguments.
        environments: what each of them gets in addition to the environment of this process.
        ask_to_end: called at SIGTERM, in place of handing it on.
        saving_s: longest wait after that; who is still there then is killed.
        grace_s: longest wait for those that end because another one failed, or at Ctrl-C.

    Returns:
        How the first that did not end well did, one that a signal killed before others; the others are ended.
    """
    with noting_requests() as requests:
        children: list[subprocess.Popen[bytes]] = []
        ended = Ended(0)
        try:
            for environment in environments:
                children.append(start(command, environment))
            while not requests:
                is_over = None not in [child.poll() for child in children]
                if (failure := _failure(children)) or is_over:
                    ended = failure or ended
                    break
                time.sleep(_POLL_S)
            else:
                if ask_to_end:
                    ask_to_end()
                else:
                    for child in children:
                        child.terminate()
                late = _wait(children, saving_s)
                ended = _failure(children) or (Ended(-signal.SIGKILL, late[0]) if late else ended)
        except KeyboardInterrupt:
            _wait(children, grace_s)
            raise
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
            _wait(children, grace_s)
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        return ended._replace(was_asked=bool(requests))


def start(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> "subprocess.Popen[bytes]":
    """A child that the kernel asks to end by SIGTERM when this process is gone.

    Args:
        command: with its arguments.
        environment: what it gets in addition to the environment of this process.
        options: of `subprocess.Popen`.
    """
    environment = {**os.environ, **environment}
    return subprocess.Popen(list(command), env=environment, preexec_fn=_with_parent(os.getpid()), **options)


def end_with_parent() -> None:
    """Has the kernel send SIGTERM to this process when its parent is gone."""
    _with_parent(os.getppid())()


def terminated_within(seconds: float) -> bool:
    """Sleeps; True as soon as this process gets SIGTERM, or if that was noted before."""
    deadline = time.monotonic() + seconds
    with noting_requests() as requests:
        while not requests and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return bool(requests)


def _failure(children: Sequence["subprocess.Popen[bytes]"]) -> Ended | None:
    """A signal is the cause where others ended by themselves at the same time."""
    failed = [Ended(child.returncode, number) for number, child in enumerate(children) if child.returncode]
    return min(failed, key=lambda ended: (ended.status > 0, ended.number), default=None)


def _wait(children: Sequence["subprocess.Popen[bytes]"], seconds: float) -> list[int]:
    """Waits until all have ended, or so long; the numbers of those that have not."""
    deadline = time.monotonic() + seconds
    while (late := [n for n, child in enumerate(children) if child.poll() is None]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return late


def _with_parent(parent: int) -> Callable[[], None]:
    library = ctypes.CDLL(None)

    def set_death_signal() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It died between fork and here: the signal would never come.
            os._exit(1)

    return set_death_signal
