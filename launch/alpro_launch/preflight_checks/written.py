"""What a preflight writes, so that nothing of it stays."""

import shutil
from contextlib import suppress
from pathlib import Path


class Written:
    """Files and folders of this preflight, on one rank."""

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._made: list[Path] = []

    def add(self, path: Path) -> None:
        """Notes a file or a folder before it is written, and which folders around it are not there yet."""
        self._made = [folder for folder in path.parents if not folder.exists()] + self._made
        self._paths.append(path)

    def remove(self) -> None:
        """Leaves everything as it was."""
        for path in self._paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # It was never written.
                    path.unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # Somebody else has put something there.
                folder.rmdir()
