"""A file on its way into the cache: hashed as it arrives, kept within the room it has, stopped when it must be."""

import errno
import hashlib
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpro_stream.media.remote import FetchConfig, fetch_into
from alpro_stream.shards.cache_errors import changed_error
from alpro_stream.shards.cache_folder import CacheFolder, Place
from alpro_stream.shards.cache_threads import StoppedError

# An index has no known size: it starts with this much room, and takes as much again as it has, up to a MiB at once.
FIRST_BYTES, _MOST_MORE_BYTES = 1 << 16, 1 << 20
_FULL_POLL_S = 0.1


class DiskError(Exception):
    """The folder failed. Not an OSError: `fetch_into` would take that for one of a temporary file.

    Attributes:
        cause: what the system says.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class OutgrownError(Exception):
    """A file is larger than the room there is for it.

    Attributes:
        num_bytes: room that it wants at least.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(f"{num_bytes} bytes or more")
        self.num_bytes = num_bytes


class Incoming(io.FileIO):
    """The partial file, written from its start.

    Args:
        folder: where it is.
        place: room for it; its descriptor is closed with this file.
        may_grow: whether more room is taken where the file turns out larger; else that is an error.
        ahead: whether files that are needed sooner must stay.
        patience_s: how long a full disk is waited for, while others fetch who may make room.
        stopped: ends the fetch at its next byte.
        count: told how many bytes came, each time.
    """

    def __init__(
        self,
        folder: CacheFolder,
        place: Place,
        *,
        may_grow: bool,
        ahead: bool,
        patience_s: float,
        stopped: threading.Event,
        count: Callable[[int], None],
    ) -> None:
        super().__init__(place.descriptor, "r+")
        self.path: Path = place.path
        self._folder, self._room, self._may_grow, self._ahead = folder, place.num_bytes, may_grow, ahead
        self._sha256, self._patience_s, self._stopped = place.sha256, patience_s, stopped
        self._count, self._hash = count, hashlib.sha256()

    def fetch(self, address: str, fetching: FetchConfig, num_bytes: int | None) -> None:
        """Fetches the file, and once more where its digest is wrong: a bit may have flipped on its way.

        Args:
            address: where the file is.
            fetching: how to fetch it.
            num_bytes: its size, if known; for the message.

        Raises:
            ShardError: of another digest, twice.
            FetchError: as `alpro_stream.media.remote.fetch_into`.
            StoppedError, OutgrownError, DiskError: as `write`.
        """
        found: list[str] = []
        for _ in range(2):
            fetch_into(self, address, None, fetching)
            if (digest := self._hash.hexdigest()) == self._sha256:
                return
            found.append(f"sha256 {digest} ({self.tell()} bytes)")
            self.seek(0)
            self.truncate()
        twice = f"{found[0]} twice" if found[0] == found[1] else f"{found[0]}, then {found[1]}"
        raise changed_error(address, twice, self._sha256, num_bytes)

    def write(self, piece: Any, /) -> int:
        """Adds bytes; gives how many of them.

        Raises:
            StoppedError: the cache was closed.
            OutgrownError: no room for them.
            DiskError: the disk is full, and nothing in the folder can go; or the folder was removed, or forbidden.
        """
        try:
            num_written = self._write(data := memoryview(piece))
        except OSError as error:
            raise DiskError(error) from error
        self._hash.update(data[:num_written])
        self._count(num_written)
        return num_written

    def truncate(self, size: int | None = None, /) -> int:
        """Starts over: only ever called at the start of the file."""
        self._hash = hashlib.sha256()
        return super().truncate(size)

    def _write(self, data: memoryview) -> int:
        if (wanted := self.tell() + len(data)) > self._room:
            self._take_room(wanted)
        give_up = time.monotonic() + self._patience_s
        while True:
            if self._stopped.is_set():
                raise StoppedError
            try:
                return super().write(data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._wait_for_disk(give_up):
                    raise

    def _take_room(self, num_bytes: int) -> None:
        more = min(num_bytes, _MOST_MORE_BYTES)
        for room in (num_bytes + more, num_bytes) if self._may_grow else ():
            if (grown := self._folder.grow(self.path, room, ahead=self._ahead)) is not None:
                self.path, self._room = grown, room
                return
        raise OutgrownError(num_bytes)

    def _wait_for_disk(self, give_up: float) -> bool:
        """Whether to try again: something was removed, or files of others are on their way, which can go once here.

        A file that is fetched ahead does not wait: what it has taken may be what another one lacks.
        """
        if self._folder.remove_one(self._sha256, ahead=self._ahead):
            return True
        if self._ahead or time.monotonic() > give_up or self._folder.num_coming() < 2:
            return False
        time.sleep(_FULL_POLL_S)
        return True
