"""Child processes that never outlive their parent."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_GRACE_S = 20


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a command to its end and returns its exit status.

    Ctrl-C reaches the child too, as both belong to the terminal's group: it is given time to end by itself. When
    this process is killed, the child is told to end by the kernel.
    """
    child = subprocess.Popen(
        list(command), env={**os.environ, **(environment or {})}, preexec_fn=_end_with_parent(os.getpid())
    )
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(timeout=_GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            child.kill()
            child.wait()
        raise


def _end_with_parent(parent: int):  # type: ignore[no-untyped-def]
    library = ctypes.CDLL(None)

    def set_death_signal() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # It died between fork and here: the signal would never come.
            os._exit(1)

    return set_death_signal
