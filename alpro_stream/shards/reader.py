"""Random access to the samples of a data set: only the bytes asked for are read."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from alpro_stream.errors import Cause, SampleError, ShardError
from alpro_stream.manifest.places import is_address, public_place
from alpro_stream.manifest.rows import BadFieldError
from alpro_stream.manifest.webdataset import medium_of
from alpro_stream.shards.files import LocalFiles, ShardFiles, open_files_problem
from alpro_stream.shards.foreign import foreign_metadata, is_foreign
from alpro_stream.shards.header import header_problem
from alpro_stream.shards.index import Member, ShardIndex, SlotError, key_of
from alpro_stream.shards.layout import DatasetInfo, ShardInfo, load_dataset_info
from alpro_stream.shards.sample import (
    CAPTION_EXTENSION,
    MAX_FRAMES,
    METADATA_EXTENSION,
    TAR_BLOCK_BYTES,
    SampleMetadata,
    frame_extension,
    is_frame,
    is_video,
)

T = TypeVar("T")


class ShardReader:
    """Reads members of samples by shard name and slot. Safe to use from several threads.

    What is wrong with one sample is a `SampleError`; what is wrong with a whole shard, a `ShardError`.

    Attributes:
        place: as given.
        info: the description.
        files: where the tars and indexes are had from.

    Args:
        place: folder or address of a split, with its ``dataset.json``; a folder may hold tars of another tool instead.
        info: the description, when it was read already.
        files: where the tars and indexes are had from; needed for an address.
        max_open: tars that stay open, and indexes that are kept. A window of shards is read at a time, so a few dozen
            are enough; an index takes about 1 MB.

    Raises:
        ShardError: see `load_dataset_info`.
    """

    def __init__(
        self,
        place: str | Path,
        info: DatasetInfo | None = None,
        files: ShardFiles | None = None,
        max_open: int = 64,
    ) -> None:
        self.place = str(place)
        if files is None and is_address(self.place):
            raise ShardError(
                f"{public_place(self.place)} is an address, and shards are read from local files; give ShardReader "
                "files=CachedFiles(place, cache)"
            )
        self.info = info or load_dataset_info(place)
        self.files = files or LocalFiles(place, self.info.options)
        self._is_foreign = is_foreign(self.info.options)
        self._shards = {shard.name: shard for shard in self.info.shards}
        self._indexes: _Recent[ShardIndex] = _Recent(self._load_index, max_open)
        self._tars: _Recent[_Tar] = _Recent(lambda name: _Tar(self.files.open_tar(self._shard(name))), max_open)
        self._counts: _Recent[NDArray[np.int64]] = _Recent(self._count, max_open)
        # Of the sample asked for last: its metadata and its media are read one after the other. Threads may take each
        # other's place, never each other's members.
        self._latest: tuple[ShardIndex | None, int, tuple[Member, ...]] = (None, 0, ())

    def index(self, shard: str) -> ShardIndex:
        """The index of a shard.

        Raises:
            ShardError: no such shard in the data set, or an index that does not fit ``dataset.json``.
        """
        return self._indexes.get(shard)

    def read(self, shard: str, slot: int, members: Sequence[Member]) -> list[bytes]:
        """The contents of some members of a sample, in the order asked for.

        Raises:
            SampleError: a member does not lie where the index says, or the tar ends inside of it.
            ShardError: the tar is missing or cannot be read.
        """
        if not members:
            return []
        try:
            tar = self._tars.get(shard)
            return [tar.read(member) for member in members]
        except _MemberError as error:
            raise SampleError(f"{shard}:{slot} {key_of(members)}", error.cause, str(error)) from error
        except OSError as error:
            place = f"{shard}:{slot} {key_of(members)}"
            name = f"{shard}.tar of {public_place(self.place)}"
            advice = open_files_problem(error) or "see that the tar is there, that this machine sees it and may read it"
            raise ShardError(f"{place}: cannot read {name}: {error.strerror or error}; {advice}") from error

    def metadata(self, shard: str, slot: int) -> SampleMetadata:
        """What is stored of a sample beside its pixels: the parsed ``<key>.json``, or the texts of another tool.

        Raises:
            SampleError: it is missing or damaged, or `read` fails.
            ShardError: see `read`.
        """
        members = self._members(shard, slot)
        if not self._is_foreign and _as_written(members):
            texts = {METADATA_EXTENSION: members[0]}
        else:
            texts = {m.extension.lower(): m for m in members if m.extension.lower() in _TEXT_EXTENSIONS}
        if not self._is_foreign:
            texts.pop(CAPTION_EXTENSION, None)
        contents = dict(zip(texts, self.read(shard, slot, list(texts.values())), strict=True))
        text, metadata = contents.get(CAPTION_EXTENSION), contents.get(METADATA_EXTENSION)
        key = key_of(members)
        try:
            if self._is_foreign:
                return foreign_metadata(members, text, metadata, shard=self._shard(shard), options=self.info.options)
            if metadata is None:
                reason = f"the sample has no .{METADATA_EXTENSION} member"
                raise SampleError(f"{shard}:{slot} {key}", "metadata", reason)
            return SampleMetadata.from_json(key, metadata)
        except BadFieldError as error:
            raise SampleError(f"{shard}:{slot} {key}", "metadata", f"no caption can be read: {error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # Not its repr: that of a text that is no UTF-8 holds the whole member.
            reason = f"damaged metadata: {type(error).__name__}: {error}"
            raise SampleError(f"{shard}:{slot} {key}", "metadata", reason) from error

    def frame_members(self, shard: str, slot: int) -> tuple[Member, ...]:
        """The numbered frames of a sample, in order.

        Raises:
            SampleError: the index does not say where the sample lies.
            ShardError: see `index`.
        """
        return tuple(member for member in self._members(shard, slot) if is_frame(member.extension))

    def media_members(self, shard: str, slot: int) -> tuple[Member, ...]:
        """The one video of a sample, else its frames in order, else the one picture that another tool stored.

        None at all of a sample that holds no pixels. A picture beside a video is its thumbnail.

        Raises:
            SampleError, ShardError: as `frame_members`.
        """
        members = self._members(shard, slot)
        if _as_written(members):
            return members[2:]
        medium = medium_of(members)
        if medium is None or not is_video(medium.extension):
            frames = tuple(member for member in members if is_frame(member.extension))
            return frames or (() if medium is None else (medium,))
        return (medium,)

    def counts(self, shard: str) -> NDArray[np.int64]:
        """Captions and questions of each slot, (num_samples, 2), from the metadata of all its samples.

        They always add up to what ``dataset.json`` says, so that a number means the same text whatever is damaged: the
        first sample whose metadata cannot be read counts for all that are missing, the others of these for none.

        Raises:
            ShardError: a tar that cannot be read, or one with other texts than ``dataset.json`` says.
        """
        return self._counts.get(shard)

    def close(self) -> None:
        """Closes the open shards; the reader opens them again when it is used again."""
        self._tars.clear()
        self._indexes.clear()
        self._counts.clear()
        self._latest = (None, 0, ())

    def _shard(self, name: str) -> ShardInfo:
        if name not in self._shards:
            raise ShardError(f"{public_place(self.place)}: no shard {name!r} in its dataset.json")
        return self._shards[name]

    def _load_index(self, name: str) -> ShardIndex:
        shard = self._shard(name)
        index = self.files.load_index(shard)
        if len(index) != shard.num_samples:
            raise ShardError(
                f"the index of {name} in {public_place(self.place)} has {len(index)} samples, but dataset.json says "
                f"{shard.num_samples}; the folder mixes two shardings, or the tar was changed: shard again"
            )
        return index

    def _members(self, shard: str, slot: int) -> tuple[Member, ...]:
        index = self.index(shard)
        latest = self._latest
        if latest[0] is index and latest[1] == slot:
            return latest[2]
        try:
            members = index.members(slot)
        except SlotError as error:
            raise SampleError(f"{shard}:{slot} ?", error.cause, str(error)) from error
        self._latest = (index, slot, members)
        return members

    def _count(self, name: str) -> NDArray[np.int64]:
        shard = self._shard(name)
        counts = np.zeros((shard.num_samples, 2), np.int64)
        first_damaged = None
        for slot in range(shard.num_samples):
            try:
                metadata = self.metadata(name, slot)
            except SampleError:
                first_damaged = slot if first_damaged is None else first_damaged
                continue
            counts[slot] = len(metadata.captions), len(metadata.qa)
        missing = np.array((shard.num_captions, shard.num_questions)) - counts.sum(0)
        if first_damaged is not None and (missing >= 0).all():
            counts[first_damaged] = missing
        elif missing.any():
            found = counts.sum(0).tolist()
            raise ShardError(
                f"{name} of {public_place(self.place)} holds {found[0]} captions and {found[1]} questions, but its "
                f"dataset.json says {shard.num_captions} and {shard.num_questions}; the tar is another one than was "
                "described: fetch it again, or shard again"
            )
        counts.flags.writeable = False
        return counts


_TEXT_EXTENSIONS = (CAPTION_EXTENSION, METADATA_EXTENSION)
_EXTENSION = attrgetter("extension")
_WRITTEN_EXTENSIONS = (METADATA_EXTENSION, CAPTION_EXTENSION, *map(frame_extension, range(MAX_FRAMES)))


def _as_written(members: Sequence[Member]) -> bool:
    """Whether they are those of a sample of frames as `alpro shard` writes it: no need to look at one by one then."""
    return len(members) > 2 and tuple(map(_EXTENSION, members)) == _WRITTEN_EXTENSIONS[: len(members)]


class _MemberError(Exception):
    """A member that cannot be read, with the word to count it by."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause: Cause = cause


class _Tar:
    """An open tar, closed when the last thread that reads from it lets go, not when it leaves the cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def read(self, member: Member) -> bytes:
        """The member's contents, when they are where it says.

        Raises:
            _MemberError: they are not, or not all of them.
        """
        if member.offset < TAR_BLOCK_BYTES or member.size < 0:
            raise _MemberError("index", f"the index has {member.name!r} at byte {member.offset}, size {member.size}")
        # A size that reaches beyond the file may be anything: it is not to decide how much memory is asked for.
        is_inside = member.offset + member.size <= self._size
        start = min(member.offset - TAR_BLOCK_BYTES, self._size)
        data = self._read(TAR_BLOCK_BYTES + (member.size if is_inside else 0), start)
        header, contents = data[:TAR_BLOCK_BYTES], data[TAR_BLOCK_BYTES:]
        if len(header) == TAR_BLOCK_BYTES and (problem := header_problem(header, member)) is not None:
            raise _MemberError("index", problem)
        if len(contents) < member.size:
            num_bytes = max(0, min(self._size - member.offset, member.size))
            raise _MemberError("truncated", f"the tar ends after {num_bytes} of {member.size} bytes of {member.name}")
        return contents

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a single call may return less than asked for
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __del__(self) -> None:
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
