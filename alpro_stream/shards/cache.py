"""Shards that lie behind addresses, read as whole local files from a folder that is shared and bounded.

All ranks of a node, and several runs, share a folder: `alpro_stream.shards.cache_folder` says what they agree on.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import FetchError, ShardError
from alpro_stream.manifest.places import public_place
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache_errors import changed_error, disk_error, may_pass, too_large_error
from alpro_stream.shards.cache_folder import CacheFolder, Place, Refusal
from alpro_stream.shards.cache_incoming import FIRST_BYTES, DiskError, Incoming, OutgrownError
from alpro_stream.shards.cache_threads import StoppedError, Threads

logger = logging.getLogger(__name__)

# Of an `open` that waits for others, and of fetching ahead that waits for others or for room.
_OPEN_POLL_S, _AHEAD_POLL_S = 0.05, 1.0
# Of fetching ahead when all is here: another user of the folder may have removed some of it since.
_LOOK_AGAIN_S = 5.0
# Of the folder, by hand, while one file is opened: more than that is no deletion but a folder that cannot be made.
_MOST_REMOVALS = 20
# A server that is silent cannot be interrupted; what hangs there is left to end by itself.
_LONGEST_CLOSE_S = 0.5


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "alpro-stream" / "shards"


class CacheConfig(Config):
    """The local cache of shards behind addresses; runs that name the same folder share it."""

    folder: Path = Field(default_factory=_default_folder)
    """Where the files are kept, on a disk of the node; $XDG_CACHE_HOME or ~/.cache, then alpro-stream/shards."""
    max_bytes: int = Field(default=200 << 30, gt=0)
    """Bound on everything in the folder, whoever wrote it; at least the shards that are read at once on the node. Among
    runs that share the folder the largest bound counts, as long as that run lives."""
    num_fetches: int = Field(default=4, ge=1)
    """Files that one process fetches ahead at the same time."""


class RemoteFile(NamedTuple):
    """A file behind an address.

    Attributes:
        address: such as ``s3://bucket/prefix/video-000000.tar``.
        sha256: its digest, in hex: its name in the cache, and checked when it was fetched.
        num_bytes: its size; None where it is not known.
    """

    address: str
    sha256: str
    num_bytes: int | None


class ShardCache:
    """Opens remote files, and fetches ahead what will be opened. Safe to use from several threads; not after a fork.

    Args:
        config: where, how much, how many at once.
        fetch: timeouts and attempts.
        waiting: gives a context that `open` enters while it waits, to measure that.

    Raises:
        ShardError: the folder cannot be made or written.
    """

    def __init__(
        self,
        config: CacheConfig,
        fetch: FetchConfig,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._config, self._fetching, self._waiting = config, fetch, waiting
        self._changed, self._stopped = threading.Condition(), threading.Event()
        self._threads = Threads(self._changed, self._stopped)
        self._order: tuple[RemoteFile, ...] = ()
        self._busy: set[str] = set()
        # Opened since it was last put back in the order: whoever reads it holds a descriptor, it need not be here.
        self._opened: set[str] = set()
        # Fetched ahead in vain: not tried again before it is opened. None is a failure that may pass.
        self._failed: dict[str, ShardError | None] = {}
        self._learned_bytes: dict[str, int] = {}
        self._no_room_until = 0.0
        self._fetches_ahead = self._warned = False
        self._fetched_bytes = 0
        try:
            self._folder = CacheFolder(config.folder, config.max_bytes)
        except OSError as error:
            raise self._disk_error(error) from error

    def open(self, file: RemoteFile) -> int:
        """A read-only descriptor of the whole file, which the caller closes; waits until it is here.

        Raises:
            ShardError: missing, forbidden, still throttled or cut short after all attempts, twice of another digest,
                larger than the cache, or no room on the disk: a later call tries again. Or the cache was stopped.
        """
        if (descriptor := self._open_here(file)) is not None:
            return descriptor
        try:
            with self._waiting():
                return self._wait_for(file)
        except StoppedError:
            raise ShardError(f"{public_place(file.address)}: the shard cache was closed") from None

    def _wait_for(self, file: RemoteFile) -> int:
        """Fetches a file, or waits until somebody else has."""
        num_removals = 0
        while not self._stopped.is_set():
            with self._changed:
                failure = self._failed.pop(file.sha256, None)
            if failure is not None:
                raise failure
            refused = self._fetch(file, ahead=False)
            if (descriptor := self._open_here(file)) is not None:
                return descriptor
            num_removals += refused is Refusal.REMOVED
            if num_removals > _MOST_REMOVALS:
                raise self._disk_error(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
            if refused is not None:
                with self._changed:
                    self._changed.wait(_OPEN_POLL_S)
        raise StoppedError

    def expect(self, files: Sequence[RemoteFile]) -> None:
        """Says what this process will read, soonest first, those it reads now included; replaces what it said before.

        What is missing is fetched in this order in the background; a failure is kept for the `open` of that file.
        What lies further ahead than twice the bound is left out. Files of unknown size may be many thousand.
        """
        if self._stopped.is_set():
            return
        order = _first_bytes({file.sha256: file for file in files}.values(), 2 * self._config.max_bytes)
        with suppress(OSError):  # a full disk: the `open` that cannot do without says so
            self._folder.expect([file.sha256 for file in order])
        with self._changed:
            before, after = _positions(self._order), _positions(order)
            # What moved back is read a second time, later.
            self._opened = {name for name in self._opened if after.get(name, len(after)) <= before.get(name, -1)}
            self._failed = {name: failure for name, failure in self._failed.items() if name in after}
            self._order, self._no_room_until = order, 0.0
            if not self._fetches_ahead and not self._stopped.is_set():
                self._fetches_ahead = True
                for number in range(self._config.num_fetches):
                    self._threads.start(self._fetch_ahead, f"shard-fetch-{number}")
            self._changed.notify_all()

    def figures(self) -> dict[str, float]:
        """Sums since the start: fetched_bytes, those of files that are still on their way included."""
        return {"fetched_bytes": float(self._fetched_bytes)}

    def stop(self) -> None:
        """Ends every `open` that waits, and what is fetched, also in the middle; returns at once."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Stops, and removes what is left of files that were on their way."""
        self.stop()
        self._threads.join(_LONGEST_CLOSE_S)
        with suppress(OSError):  # the next user of the folder removes it
            self._folder.close()

    def _fetch_ahead(self) -> None:
        while True:
            order = self._order
            waits = self._go_through(order)
            with self._changed:
                if self._stopped.is_set():
                    return
                if self._order is order:
                    self._changed.wait(_AHEAD_POLL_S if waits else _LOOK_AGAIN_S)

    def _go_through(self, order: Sequence[RemoteFile]) -> bool:
        """Fetches what nobody fetches yet; whether something is left to wait for: room, or what another fetches."""
        waits = False
        for file in order:
            if self._stopped.is_set() or self._order is not order:
                return True
            if time.monotonic() < self._no_room_until:
                return True  # one look a second at a full folder, of all threads together
            if not self._take(file):
                continue
            refused = None
            try:
                refused = self._fetch(file, ahead=True)
            except ShardError as failure:
                with self._changed:
                    self._failed[file.sha256] = None if may_pass(failure) else failure
            except StoppedError:
                return True
            finally:
                with self._changed:
                    self._busy.discard(file.sha256)
                    if refused is Refusal.NO_ROOM:
                        self._no_room_until = time.monotonic() + _AHEAD_POLL_S
            waits = waits or refused in (Refusal.COMING, Refusal.NO_ROOM, Refusal.REMOVED)
        return waits

    def _take(self, file: RemoteFile) -> bool:
        """Whether this thread has to fetch the file."""
        with self._changed:
            if any(file.sha256 in done for done in (self._busy, self._opened, self._failed)):
                return False
            if self._folder.holds(file.sha256):
                return False
            self._busy.add(file.sha256)
            return True

    def _open_here(self, file: RemoteFile) -> int | None:
        try:
            descriptor = self._folder.open(file.sha256)
        except OSError as error:
            raise self._disk_error(error) from error
        if descriptor is not None:
            with self._changed:
                self._opened.add(file.sha256)
                self._failed.pop(file.sha256, None)
        return descriptor

    def _fetch(self, file: RemoteFile, *, ahead: bool) -> Refusal | None:
        """Fetches a file into the folder, or says why it need not or cannot now.

        Raises:
            ShardError: as `open`.
            StoppedError: the cache was closed.
        """
        num_bytes = file.num_bytes
        if num_bytes is None:
            num_bytes = self._learned_bytes.get(file.sha256, min(FIRST_BYTES, self._config.max_bytes))
        self._check_size(file, num_bytes)
        try:
            place = self._folder.claim(file.sha256, num_bytes, ahead=ahead)
            if isinstance(place, Refusal):
                return place
            if ahead:
                return self._receive(file, place, ahead)
            self._warn_if_too_small(file, place.removed)
            # Apart, so that whoever opens the file can be stopped while a server is silent.
            return self._threads.run(lambda: self._receive(file, place, ahead=False), "shard-fetch-now")
        # Removed at this very moment: making it may find that it is there, and then that it is not; and its lock may
        # be a new one while somebody else still holds the old one.
        except (FileNotFoundError, FileExistsError, BlockingIOError):
            return Refusal.REMOVED
        except OSError as error:
            raise self._disk_error(error) from error
        except FetchError as error:
            raise ShardError(f"{public_place(file.address)}: {error}") from error

    def _receive(self, file: RemoteFile, place: Place, ahead: bool) -> Refusal | None:
        # The size is known to be wanted, so it is not refused for being large.
        most_bytes = max(self._fetching.max_bytes, file.num_bytes or 0)
        fetching = self._fetching.model_copy(update={"max_bytes": most_bytes})
        with Incoming(
            self._folder,
            place,
            may_grow=file.num_bytes is None,
            ahead=ahead,
            patience_s=self._fetching.timeout_s,
            stopped=self._stopped,
            count=self._count,
        ) as incoming:
            try:
                incoming.fetch(file.address, fetching, file.num_bytes)
                self._folder.publish(incoming.path, incoming.fileno())
            except DiskError as failed:
                raise failed.cause from failed
            except OutgrownError as outgrown:
                if file.num_bytes is not None:
                    raise changed_error(file.address, str(outgrown), file.sha256, file.num_bytes) from outgrown
                self._check_size(file, outgrown.num_bytes)
                self._learned_bytes[file.sha256] = outgrown.num_bytes
                return Refusal.NO_ROOM
            finally:
                self._folder.drop(incoming.path)
                with self._changed:
                    self._changed.notify_all()
        return None

    def _count(self, num_bytes: int) -> None:
        with self._changed:
            self._fetched_bytes += num_bytes

    def _check_size(self, file: RemoteFile, num_bytes: int) -> None:
        if num_bytes > (limit := self._config.max_bytes):
            raise too_large_error(file.address, num_bytes, limit)

    def _warn_if_too_small(self, file: RemoteFile, removed: Sequence[str]) -> None:
        """Says once that files are removed which this process still reads, or reads before the one it opens."""
        if self._warned or not removed:
            return
        order = self._order
        positions = _positions(order)
        sooner = positions.get(file.sha256, len(order))
        if not any(positions.get(name, sooner) < sooner for name in removed):
            return
        self._warned = True
        num_bytes = sum(listed.num_bytes or 0 for listed in order[: sooner + 1])
        logger.warning(
            "the shard cache %s is too small: it holds stream.cache.max_bytes=%d bytes, and the shards that are read "
            "at once are fetched again and again; raise stream.cache.max_bytes (this process alone needs about %d)",
            self._config.folder,
            self._config.max_bytes,
            num_bytes,
        )

    def _disk_error(self, error: OSError) -> ShardError:
        return disk_error(self._config.folder, self._config.max_bytes, error)


def _first_bytes(files: Iterable[RemoteFile], num_bytes: int) -> tuple[RemoteFile, ...]:
    """So many of the files, from the first on."""
    positions = accumulate((file.num_bytes or 0 for file in files), initial=0)
    return tuple(file for file, position in zip(files, positions, strict=False) if position < num_bytes)


def _positions(order: Sequence[RemoteFile]) -> dict[str, int]:
    return {file.sha256: position for position, file in enumerate(order)}
