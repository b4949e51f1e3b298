"""Notices when this rank stands still: writes down what all its processes do, then ends it by name.

Collectives have a deadline of their own, which names the rank that is missing. It does not help the missing one: a
rank that hangs in a read, in a decoder or in a driver would stay for ever.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from alpro_stream.exit_status import HARDWARE
from alpro_stream.stacks import collecting, write_stacks
from alpro_stream.train.stage import Stage

# Of the limit: before collectives give up, so that their stacks are still there.
_WRITING_AT = 0.9
# At most; for the collective's own error, which says more, but needs some seconds to find out who is missing.
_GRACE_S = 15.0
_TICK_S = 1.0


@contextlib.contextmanager
def watching(
    stage: Stage, limit_s: float, folder: Path, rank: int, on_silence: Callable[[str], None]
) -> Iterator[None]:
    """Watches this rank while the block runs.

    A thread looks; where a call holds the interpreter's lock so that it cannot, a timer in native code ends the process
    a little later, with status 1.

    Args:
        stage: what the rank does now.
        limit_s: seconds without a new stage after which it counts as standing still.
        folder: gets ``stacks-rank0.txt``, with the stacks of this process and of all that it started.
        rank: of this process.
        on_silence: called with a message when nothing has moved for some seconds more; such as `end_process`.
    """
    over, grace_s = threading.Event(), min(_GRACE_S, limit_s)
    path = folder / f"stacks-rank{rank}.txt"
    with collecting(path) as file:

        def watch() -> None:
            written_for = said_for = None
            while not over.wait(min(_TICK_S, limit_s / 4)):
                faulthandler.dump_traceback_later(limit_s + 2 * grace_s, exit=True, file=file)
                name, since = stage.now
                silent_s = time.monotonic() - since
                if silent_s < _WRITING_AT * limit_s:
                    continue
                said = f"rank {rank} on {socket.gethostname()} has been at {name} for {silent_s:.0f} s"
                if written_for != since:
                    written_for = since
                    write_stacks(file, said, _descendants())
                if silent_s >= limit_s + grace_s and said_for != since:
                    said_for = since
                    on_silence(
                        f"{said}, and does not come out of it (train.timeout_s={limit_s:g}); what its processes do is "
                        f"in {path}"
                    )

        thread = threading.Thread(target=watch, name="alpro-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()


def end_process(message: str) -> None:
    """Says it, and ends this process as it is; what it started ends with it."""
    with contextlib.suppress(OSError):  # Nobody reads any more.
        print(f"rank {os.environ.get('RANK', '0')}: error: {message}", file=sys.stderr, flush=True)
    os._exit(HARDWARE)


def _descendants() -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process().children(recursive=True)]
    return []
