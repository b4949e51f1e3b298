"""How every rank's process ends: one message, and a status that says where to look."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from alpro_stream.errors import AlproError
from alpro_stream.exit_status import INTERRUPTED, status_of


def is_first_rank() -> bool:
    """Whether this is rank 0, by what launchers and Slurm set; also before anything is read or checked."""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def run_rank(work: Callable[[], int], say_interrupted: Callable[[], None] = lambda: None) -> int:
    """Does the work of a rank; returns its exit status, or that of its error.

    Args:
        work: returns the status where it does not fail.
        say_interrupted: called after Ctrl-C.
    """
    # Several processes share the cores; `alpro` sets it too, but not on other machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Read when torch is imported. Its pages of stacks would hide the message below them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return work()
    except (AlproError, OSError) as error:  # A folder that cannot be written, a full disk: the system says it.
        who = f"rank {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        with suppress(OSError):  # Nobody reads any more.
            print(f"{who}error: {error}", file=sys.stderr, flush=True)
        return status_of(error)
    except Exception as error:
        traceback.print_exc()
        return status_of(error)
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED


def leave(status: int) -> NoReturn:
    """Ends this process as it is, what it has said included.

    The end of the interpreter would meet the threads of torch's process group, and now and then abort: what was done,
    or had failed for a reason it had told, then had another status.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # Nobody reads any more.
            stream.flush()
    os._exit(status)
