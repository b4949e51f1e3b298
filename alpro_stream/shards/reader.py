"""Random access to the samples of a data set: only the bytes asked for are read."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from alpro_stream.errors import ShardError
from alpro_stream.shards.index import Member, ShardIndex
from alpro_stream.shards.layout import DatasetInfo, index_path, load_dataset_info, tar_path
from alpro_stream.shards.sample import METADATA_EXTENSION, SampleMetadata

T = TypeVar("T")

# A window of shards is read at a time, so a few dozen are enough; an index takes up to about 1 MB.
MAX_OPEN_SHARDS = 64


class ShardReader:
    """Reads members of samples by shard name and slot. Safe to use from several threads.

    Args:
        directory: folder of a split, with its ``dataset.json``.
        info: the description, when it was read already.

    Raises:
        ShardError: see `load_dataset_info`.
    """

    def __init__(self, directory: str | Path, info: DatasetInfo | None = None) -> None:
        self.directory = Path(directory)
        self.info = info or load_dataset_info(self.directory)
        self._num_samples = {shard.name: shard.num_samples for shard in self.info.shards}
        self._indexes: _Recent[ShardIndex] = _Recent(self._load_index, MAX_OPEN_SHARDS)
        self._files: _Recent[_ShardFile] = _Recent(lambda shard: _ShardFile(self._tar(shard)), MAX_OPEN_SHARDS)

    def index(self, shard: str) -> ShardIndex:
        """The index of a shard.

        Raises:
            ShardError: no such shard in the data set, or an index that does not fit ``dataset.json``.
        """
        return self._indexes.get(shard)

    def read(self, shard: str, slot: int, members: Sequence[Member]) -> list[bytes]:
        """The contents of some members of a sample, in the order asked for.

        Raises:
            ShardError: naming ``shard:slot key`` when the tar is missing or ends too early.
        """
        try:
            file = self._files.get(shard)
            return [file.read(member) for member in members]
        except (OSError, EOFError) as error:
            where = f"{shard}:{slot} {self.index(shard).key(slot)}"
            raise ShardError(f"{where}: cannot read {self._tar(shard)}: {error}") from error

    def metadata(self, shard: str, slot: int) -> SampleMetadata:
        """The parsed ``<key>.json`` of a sample.

        Raises:
            ShardError: it is missing or damaged.
        """
        index = self.index(shard)
        key = index.key(slot)
        members = [member for member in index.members(slot) if member.extension == METADATA_EXTENSION]
        if not members:
            raise ShardError(f"{shard}:{slot} {key}: the sample has no .{METADATA_EXTENSION} member")
        (data,) = self.read(shard, slot, members[:1])
        try:
            return SampleMetadata.from_json(key, data)
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{shard}:{slot} {key}: damaged metadata: {error!r}") from error

    def frame_members(self, shard: str, slot: int) -> tuple[Member, ...]:
        """The frames of a sample, in order."""
        return self.index(shard).frame_members(slot)

    def close(self) -> None:
        """Closes the open shards; the reader opens them again when it is used again."""
        self._files.clear()
        self._indexes.clear()

    def _load_index(self, shard: str) -> ShardIndex:
        if shard not in self._num_samples:
            raise ShardError(f"{self.directory}: no shard {shard!r} in its dataset.json")
        index = ShardIndex.load(index_path(self.directory, shard))
        if len(index) != self._num_samples[shard]:
            raise ShardError(
                f"{index_path(self.directory, shard)}: {len(index)} samples, but dataset.json says "
                f"{self._num_samples[shard]}; the folder mixes two shardings"
            )
        return index

    def _tar(self, shard: str) -> Path:
        return tar_path(self.directory, shard)


class _ShardFile:
    """An open tar. Closed when the last thread that reads from it lets go, not when it leaves the cache."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, member: Member) -> bytes:
        """The member's contents.

        Raises:
            EOFError: the file ends inside the member.
        """
        data = os.pread(self._descriptor, member.size, member.offset)
        while len(data) < member.size:  # a single call may return less than asked for
            more = os.pread(self._descriptor, member.size - len(data), member.offset + len(data))
            if not more:
                raise EOFError(f"{member.name} ends after {len(data)} of {member.size} bytes")
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Recent(Generic[T]):
    """The values used last, made by a function of their name; the one unused longest goes first."""

    def __init__(self, make: Callable[[str], T], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._lock = threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, name: str) -> T:
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
                return self._values[name]
        value = self._make(name)  # outside the lock: reading an index must not hold up other threads
        with self._lock:
            value = self._values.setdefault(name, value)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
