"""Where the tars and indexes of a data set are: in a folder, or behind an address and fetched into a local cache."""

import errno
import logging
import os
import resource
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from alpro_stream.errors import ShardError
from alpro_stream.manifest import public_place
from alpro_stream.shards.cache import RemoteFile, ShardCache
from alpro_stream.shards.foreign import index_without_file
from alpro_stream.shards.index import ShardIndex
from alpro_stream.shards.layout import ShardInfo, index_path, tar_path
from alpro_stream.shards.remote_files import join

logger = logging.getLogger(__name__)


class ShardFiles(Protocol):
    """Gives the files of a data set's shards; called from several threads."""

    def open_tar(self, shard: ShardInfo) -> int:
        """A read-only descriptor of the tar, which the caller closes.

        Raises:
            OSError, ShardError: it is missing or cannot be read.
        """
        ...

    def load_index(self, shard: ShardInfo) -> ShardIndex:
        """The index of the shard.

        Raises:
            ShardError: it cannot be had.
        """
        ...


def open_files_problem(error: BaseException | None) -> str | None:
    """What to do about an error of too many open files; None of any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EMFILE:
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"this process has {limit} files open, and may have no more: raise its limit (`ulimit -n`, here up to "
            f"{'any number' if most == resource.RLIM_INFINITY else most}), or use a smaller window_shards or more ranks"
        )
    if number == errno.ENFILE:
        return "this machine may have no more files open (sysctl fs.file-max): raise that, or run less on it"
    return None


class LocalFiles:
    """Shards of a folder. An index that is missing or damaged is made from the headers of the tar, in memory.

    Args:
        directory: the folder.
        options: those of the data set's description; they tell tars of other tools from our own shards.
    """

    def __init__(self, directory: str | Path, options: Mapping[str, Any] | None = None) -> None:
        self._directory = Path(directory)
        self._options = options or {}
        self._lock = threading.Lock()
        self._has_told = False

    def open_tar(self, shard: ShardInfo) -> int:
        """See `ShardFiles`."""
        return os.open(tar_path(self._directory, shard.name), os.O_RDONLY | os.O_CLOEXEC)

    def load_index(self, shard: ShardInfo) -> ShardIndex:
        """See `ShardFiles`."""
        path = index_path(self._directory, shard.name)
        try:
            return ShardIndex.load(path)
        except ShardError as error:
            if problem := open_files_problem(error.__cause__):
                raise ShardError(f"{path} cannot be opened: {problem}") from error
            with self._lock:
                has_told, self._has_told = self._has_told, True
            if not has_told:
                logger.warning("%s. It is made from the tar instead, in memory, as are all that cannot be read", error)
        return index_without_file(tar_path(self._directory, shard.name), shard, self._options)


class CachedFiles:
    """Shards behind an address, through a folder of whole local files.

    Args:
        place: address of the data set.
        cache: where they are fetched to.
    """

    def __init__(self, place: str, cache: ShardCache) -> None:
        self._place = place
        self.cache = cache

    def tar(self, shard: ShardInfo) -> RemoteFile:
        """The tar of a shard."""
        return RemoteFile(join(self._place, tar_path(Path(), shard.name).name), shard.sha256, shard.num_bytes)

    def index(self, shard: ShardInfo) -> RemoteFile:
        """The index of a shard."""
        return RemoteFile(join(self._place, index_path(Path(), shard.name).name), shard.index_sha256, None)

    def open_tar(self, shard: ShardInfo) -> int:
        """See `ShardFiles`."""
        return self.cache.open(self.tar(shard))

    def load_index(self, shard: ShardInfo) -> ShardIndex:
        """See `ShardFiles`."""
        index = self.index(shard)
        with os.fdopen(self.cache.open(index), "rb") as file:
            return ShardIndex(file.read(), public_place(index.address))
