"""What every thread of a process does, written into a file: for runs that stand still.

Each process of a rank takes part by `take_part`. A signal that Python only notes would wait as long as the call that
hangs; the handler used here is native code and writes at once.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

_VARIABLE = "ALPRO_STACKS"
_WRITING_S = 0.2


@contextlib.contextmanager
def collecting(path: Path) -> Iterator[TextIO]:
    """Inside, this process and all that it starts write their stacks to a file when they are asked.

    The file is given for `write_stacks`; it is removed again if nothing is in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        os.environ[_VARIABLE] = str(path.absolute())
        _write_on_signal(file)
        try:
            yield file
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            del os.environ[_VARIABLE]
    if not path.stat().st_size:
        path.unlink()


def take_part() -> None:
    """In a process that was started: writes its stacks to the file of the one that started it, if there is one."""
    place = os.environ.get(_VARIABLE)
    if place and Path(place).is_file():
        _files.append(Path(place).open("a", encoding="utf-8"))  # noqa: SIM115
        _write_on_signal(_files[-1])


# Open as long as the process lives: the handler has the descriptor only.
_files: list[TextIO] = []


def _write_on_signal(file: TextIO) -> None:
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def write_stacks(file: TextIO, why: str, others: Iterable[int]) -> None:
    """Writes the stacks of this process and of others to the file that they share.

    Args:
        file: as `collecting` gives it.
        why: for the first line.
        others: process ids; those that do not take part are named, and not disturbed.
    """
    file.write(f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n-- process {os.getpid()}: {' '.join(sys.argv)}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    for pid in others:
        takes_part, doing = _handles_usr1(pid), _state_and_command(pid)
        file.write(f"\n-- process {pid}: {doing}{'' if takes_part else ' (does not tell its stacks)'}\n")
        file.flush()
        if takes_part:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
                time.sleep(_WRITING_S)  # else the next one would write into its lines


def _handles_usr1(pid: int) -> bool:
    """The signal would end a process that has no handler for it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def _state_and_command(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "has ended"
    return f"{'stopped, ' if state == 'T' else ''}{command}"
