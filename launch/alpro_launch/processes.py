"""Child processes that never outlive their parent."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1
_GRACE_S = 20
# For those that save when they are asked to end.
_SAVING_S = 600
_POLL_S = 0.1


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]] = ({},)) -> int:
    """Runs a command once for each environment, all at the same time, to the end.

    Ctrl-C reaches the children too, as they belong to the terminal's group: they are given time to end by themselves.
    SIGTERM is handed on to them, and they are waited for. When this process is killed, the kernel ends the children.

    Returns:
        0 when all ended well; else the status of the first that did not (minus the signal that killed it), and the
        others are ended.
    """
    set_death_signal = _end_with_parent(os.getpid())
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    children = [
        subprocess.Popen(list(command), env={**os.environ, **environment}, preexec_fn=set_death_signal)
        for environment in environments
    ]
    try:
        return _first_failure(children)
    except KeyboardInterrupt:
        _wait(children)
        raise
    except _TerminatedError:
        for child in children:
            child.terminate()
        _wait(children, _SAVING_S)
        return next((status for child in children if (status := child.poll())), 0)
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            if child.poll() is None:
                child.terminate()
        _wait(children)
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def _first_failure(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    while True:
        statuses = [child.poll() for child in children]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            return failed[0] if failed else 0
        time.sleep(_POLL_S)


class _TerminatedError(Exception):
    """This process got SIGTERM."""


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _wait(children: Sequence["subprocess.Popen[bytes]"], seconds: float = _GRACE_S) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(_POLL_S)


def _end_with_parent(parent: int) -> Callable[[], None]:
    library = ctypes.CDLL(None)

    def set_death_signal() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It died between fork and here: the signal would never come.
            os._exit(1)

    return set_death_signal
