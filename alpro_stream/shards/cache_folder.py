"""A folder of whole files that several processes fill and empty at once, bounded in bytes.

Layout: ``files/SHA256`` are whole; ``partial/SHA256.BYTES.UNIQUE`` are on their way and have BYTES set aside for them;
``users/UNIQUE.json`` is what a living process will read, soonest first, and its bound: the largest of them counts.
Whoever writes a partial file or a user file holds a lock on it, which ends with the process: what nobody holds is left
over from a killed one. Everything that counts bytes or makes room does so under the lock of the whole folder.
``num_bytes`` is the size of all whole files or more, so that they need not be counted while there is room.
"""

import fcntl
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """A whole file in the folder.

    Attributes:
        sha256: its name.
        num_bytes: its size.
        last_used_ns: when it was last opened, in nanoseconds since 1970.
    """

    sha256: str
    num_bytes: int
    last_used_ns: int


class Refusal(Enum):
    """Why nobody has to fetch, or may fetch, a file now."""

    HERE = auto()
    """It is in the folder."""
    COMING = auto()
    """Another fetches it."""
    NO_ROOM = auto()
    """All that could make room is needed sooner, or on its way itself."""
    REMOVED = auto()
    """The folder, or what was on its way, was removed by hand: to be tried again."""


class Place(NamedTuple):
    """Room for a file that is on its way.

    Attributes:
        sha256: of the whole file.
        num_bytes: set aside for it.
        descriptor: of the file, empty and locked; to be closed by whoever claimed it.
        path: where it is.
        removed: what was removed for it.
    """

    sha256: str
    num_bytes: int
    descriptor: int
    path: Path
    removed: tuple[str, ...]


def files_to_remove(
    files: Sequence[Held], needs: Mapping[str, int], num_bytes: int, later_than: int
) -> list[Held] | None:
    """The files that make so much room: first those that nobody needs, longest unused first, then those needed last.

    Args:
        files: all there are.
        needs: of a file, how soon it is needed: 0 is now.
        num_bytes: room that is wanted.
        later_than: files needed this soon or sooner are kept.

    Returns:
        None when that is not enough.
    """
    unneeded = sorted((file for file in files if file.sha256 not in needs), key=lambda file: file.last_used_ns)
    needed = [file for file in files if needs.get(file.sha256, -1) > later_than]
    chosen: list[Held] = []
    for file in unneeded + sorted(needed, key=lambda file: -needs[file.sha256]):
        if num_bytes <= 0:
            break
        chosen.append(file)
        num_bytes -= file.num_bytes
    return chosen if num_bytes <= 0 else None


class CacheFolder:
    """One user's hold on the folder. Safe to use from several threads.

    Args:
        folder: made where it is missing.
        max_bytes: bound on whole and partial files together; that of another living user counts where it is larger.

    Raises:
        OSError: as all methods: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = folder, max_bytes
        self._files, self._partial, self._users = folder / "files", folder / "partial", folder / "users"
        self._sum = folder / "num_bytes"
        # Not asked whether somebody holds them: some network file systems would let go of the lock.
        self._mine: set[Path] = set()
        self._user = self._users / f"{uuid.uuid4().hex}.json"
        self._user_file: io.FileIO | None = None
        with self._locked():
            self._write_expected([])
            self._tell_by_users()
            self._partial_bytes()
            self._keep_sum(sum(file.num_bytes for file in self._held()))

    def open(self, sha256: str) -> int | None:
        """A descriptor of a whole file, and notes that it was used; None when it is not here."""
        try:
            descriptor = os.open(self._files / sha256, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with suppress(OSError):  # a file of somebody else: its age is theirs
            os.utime(descriptor)
        return descriptor

    def holds(self, sha256: str) -> bool:
        """Whether the whole file is here."""
        return (self._files / sha256).exists()

    def expect(self, order: Sequence[str]) -> None:
        """Tells all processes what this one will read, soonest first."""
        with self._locked():
            self._write_expected(order)

    def claim(self, sha256: str, num_bytes: int, *, ahead: bool) -> Place | Refusal:
        """Room for a file that is to be fetched, by this caller and nobody else until it is published or dropped.

        Args:
            sha256: the file.
            num_bytes: room for it.
            ahead: whether files that are needed sooner than this one must stay.
        """
        with self._locked():
            if self.holds(sha256):
                return Refusal.HERE
            if any(path.name.startswith(f"{sha256}.") for path in self._partial_bytes()):
                return Refusal.COMING
            removed = self._make_room(sha256, num_bytes, ahead)
            if removed is None:
                return Refusal.NO_ROOM
            path = self._partial / f"{sha256}.{num_bytes}.{uuid.uuid4().hex}"
            self._mine.add(path)
            return Place(sha256, num_bytes, _create_locked(path), path, removed)

    def grow(self, path: Path, num_bytes: int, *, ahead: bool) -> Path | None:
        """Room for a partial file that turns out larger; gives its new path, or None when there is no room."""
        sha256, old, unique = path.name.split(".")
        with self._locked():
            if self._make_room(sha256, num_bytes - int(old), ahead) is None:
                return None
            grown = path.with_name(f"{sha256}.{num_bytes}.{unique}")
            self._mine.add(grown)  # first: another thread of this user must not take it for left over
            try:
                path.rename(grown)
            except OSError:
                self._mine.discard(grown)
                raise
            self._mine.discard(path)
            return grown

    def remove_one(self, sha256: str, *, ahead: bool) -> bool:
        """Removes the file that can best be spared for another one; False when there is none."""
        with self._locked():
            needs, _ = self._tell_by_users()
            return bool(self._remove(self._held(), needs, sha256, 1, ahead))

    def num_coming(self) -> int:
        """How many files are on their way, of all processes."""
        with self._locked():
            return len(self._partial_bytes())

    def publish(self, path: Path, descriptor: int) -> None:
        """Makes a partial file a whole one.

        Its bytes are on the disk first: a file of this name is trusted, also after a power cut.
        """
        os.fsync(descriptor)
        sha256 = path.name.partition(".")[0]
        with self._locked():
            # First: it may say too much, never too little.
            if (num_bytes := self._kept_sum()) is not None:
                self._keep_sum(num_bytes + os.fstat(descriptor).st_size)
            path.replace(self._files / sha256)
            self._mine.discard(path)

    def drop(self, path: Path) -> None:
        """Removes a partial file, if it is still there."""
        path.unlink(missing_ok=True)
        self._mine.discard(path)

    def close(self) -> None:
        """Removes what is this user's alone."""
        for path in [*self._mine, self._user]:
            path.unlink(missing_ok=True)
        self._mine.clear()
        if self._user_file is not None:
            self._user_file.close()
            self._user_file = None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock of the whole folder, made anew by whoever finds it removed."""
        for folder in (self._files, self._partial, self._users):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write_expected(self, order: Sequence[str]) -> None:
        if self._user_file is None or not self._user.exists():
            self._user_file = io.FileIO(_create_locked(self._user), "r+")
        # In place, because the lock belongs to this file; nobody reads it meanwhile, the folder is locked.
        self._user_file.seek(0)
        self._user_file.truncate()
        self._user_file.write(json.dumps({"max_bytes": self._max_bytes, "order": list(order)}).encode())

    def _tell_by_users(self) -> tuple[dict[str, int], int]:
        """How soon the living users need each file, and the largest of their bounds; files of dead ones are removed."""
        needs: dict[str, int] = {}
        max_bytes = self._max_bytes
        for path in self._users.iterdir():
            if path != self._user and _remove_if_dead(path):
                continue
            # Not readable when the disk was full: that user's files are then not spared.
            with suppress(OSError, ValueError):
                told = json.loads(path.read_bytes())
                max_bytes = max(max_bytes, told["max_bytes"])
                for position, sha256 in enumerate(told["order"]):
                    needs[sha256] = min(position, needs.get(sha256, position))
        return needs, max_bytes

    def _partial_bytes(self) -> dict[Path, int]:
        """Room that living partial files take; dead ones are removed."""
        sizes: dict[Path, int] = {}
        for path in self._partial.iterdir():
            if path not in self._mine and _remove_if_dead(path):
                continue
            with suppress(OSError):  # just dropped
                sizes[path] = max(int(path.name.split(".")[1]), path.stat().st_size)
        return sizes

    def _held(self) -> list[Held]:
        with os.scandir(self._files) as entries:
            states = [(entry.name, entry.stat()) for entry in entries]
        return [Held(name, state.st_size, state.st_mtime_ns) for name, state in states]

    def _make_room(self, sha256: str, num_bytes: int, ahead: bool) -> tuple[str, ...] | None:
        num_bytes += sum(self._partial_bytes().values())
        kept = self._kept_sum()
        if kept is not None and kept + num_bytes <= self._max_bytes:
            return ()
        files = self._held()
        self._keep_sum(total := sum(file.num_bytes for file in files))
        needs, max_bytes = self._tell_by_users()
        missing = total + num_bytes - max_bytes
        return () if missing <= 0 else self._remove(files, needs, sha256, missing, ahead)

    def _remove(
        self, files: Sequence[Held], needs: Mapping[str, int], sha256: str, num_bytes: int, ahead: bool
    ) -> tuple[str, ...] | None:
        """Removes what makes so much room for a file, or nothing; readers are not disturbed: they hold descriptors."""
        later_than = needs.get(sha256, max(needs.values(), default=0)) if ahead else -1
        chosen = files_to_remove(files, needs, num_bytes, later_than)
        if chosen is None:
            return None
        for file in chosen:
            (self._files / file.sha256).unlink(missing_ok=True)
        self._keep_sum(sum(file.num_bytes for file in files) - sum(file.num_bytes for file in chosen))
        return tuple(file.sha256 for file in chosen)

    def _kept_sum(self) -> int | None:
        """Bytes of the whole files, or more; None where that is not known."""
        try:
            return int(self._sum.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _keep_sum(self, num_bytes: int) -> None:
        try:
            self._sum.write_text(str(num_bytes))
        except OSError:  # a full disk: it is counted anew
            self._sum.unlink(missing_ok=True)


def _create_locked(path: Path) -> int:
    """A new file, locked for as long as this process lives and keeps it open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_if_dead(path: Path) -> bool:
    """Removes a file that nobody holds; whether it is gone. To be asked under the lock of the folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:  # of somebody else, who is left to remove it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
