"""Opening media by place: a file, a part of a file or an address, always as an open file of bytes.

What decodes gets this file and no name, so that nothing in it can make a decoder open something else.
"""

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from alpro_stream.errors import UnreadableError
from alpro_stream.manifest.places import is_address
from alpro_stream.media.remote import FetchConfig, fetch_into

_DEFAULT_FETCH = FetchConfig()


@contextmanager
def open_media(
    place: str | Path, *, byte_range: tuple[int, int] | None = None, fetch: FetchConfig = _DEFAULT_FETCH
) -> Iterator[BinaryIO]:
    """Opens a file or what is behind an address, for reading and seeking; an address is fetched whole first.

    The messages of errors do not name the place: it is the caller's to say which row or argument it came from.

    Args:
        place: a path, or an ``http://``, ``https://`` or ``s3://`` address.
        byte_range: offset and size, in bytes, of the medium inside the file (a member of a tar); None is all of it.
        fetch: how an address is fetched.

    Raises:
        UnreadableError: no regular file that can be read, an empty one, or one that ends before the range does.
        FetchError: an address that cannot be fetched.
        OSError: no room in the folder for temporary files, which it names; no other address could be fetched either.
    """
    if is_address(str(place)):
        # Without a name, so that nothing stays behind however the process ends.
        # Without a buffer, because what a full disk leaves in one would fail once more when the file is closed.
        with tempfile.TemporaryFile(buffering=0) as temporary:
            fetch_into(cast(BinaryIO, temporary), str(place), byte_range, fetch)
            if temporary.tell() == 0:
                raise UnreadableError("the file is empty")
            temporary.seek(0)
            with io.BufferedReader(temporary) as file:
                yield file
        return
    with open_regular_file(Path(place)) as file:
        if byte_range is None:
            yield file
        else:
            with window_of(file.fileno(), *byte_range) as window:
                yield window


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; pipes, devices and folders are refused without waiting on them.

    Raises:
        UnreadableError: the file is missing, unreadable, empty or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot open the file: {getattr(error, 'strerror', None) or error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnreadableError("not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size == 0:
            raise UnreadableError("the file is empty")
        yield file


def window_of(descriptor: int, offset: int, size: int) -> BinaryIO:
    """A part of an open file as a file of its own; several of them do not move each other.

    Args:
        descriptor: of the open file, which must stay open.
        offset: where the part begins, in bytes.
        size: its bytes, at least 1.

    Raises:
        UnreadableError: the file ends before the part does.
    """
    return io.BufferedReader(_Window(descriptor, offset, size))


def digest_of(file: BinaryIO) -> str:
    """SHA-256 of everything in an open file, in hexadecimal; the position in the file stays where it was."""
    position = file.tell()
    file.seek(0)
    digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    file.seek(position)
    return digest


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        super().__init__()
        file_size = os.fstat(descriptor).st_size
        if offset < 0 or size < 1 or offset + size > file_size:
            raise UnreadableError(
                f"bytes {offset} to {offset + size} were expected in a file that holds {file_size}; it was cut off or "
                "changed"
            )
        self._descriptor, self._offset, self._size = descriptor, offset, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to {position}, before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        # Reads by position, so that several windows of one open file do not move each other.
        read = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._offset + self._position)
        self._position += read
        return read
