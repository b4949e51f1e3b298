"""What a process has open, to see what a test leaves behind."""

from contextlib import suppress
from pathlib import Path


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process and what each is of; sockets and pipes have numbers of their own.

    What is new is looked for, never how many there are: what earlier tests left may be closed at any time.
    """
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add((path.name, str(path.readlink())))
    return found
