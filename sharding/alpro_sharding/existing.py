"""Samples that a tar on disk holds already, so that a shard is completed without decoding them again.

Their sources may be gone: a video that was once fetched is not fetched a second time.
"""

import io
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from alpro_stream.errors import ShardError
from alpro_stream.manifest import ManifestRow, sample_key
from alpro_stream.media import digest_of, window_of
from alpro_stream.shards import Member, Sample, SampleMetadata, VideoFile, index_tar
from alpro_stream.shards.layout import tar_path
from alpro_stream.shards.sample import METADATA_EXTENSION, VIDEO_EXTENSIONS, is_frame


class ExistingSamples:
    """The samples of a shard's tar; none when there is no tar, one that cannot be read, or one that was damaged since.

    Args:
        directory: folder of the split.
        name: the shard's name.
        trusted: SHA-256 digests that the tar may have.
    """

    def __init__(self, directory: Path, name: str, trusted: frozenset[str]) -> None:
        path = tar_path(directory, name)
        self._members: dict[str, tuple[Member, ...]] = {}
        self._file: io.BufferedReader | None = None
        try:
            self._file = path.open("rb")
            if not trusted or digest_of(self._file) not in trusted:
                return
            samples = index_tar(path)
        except (ShardError, OSError):
            return
        self._members = {members[0].name.partition(".")[0]: members for members in samples}

    def get(self, row: ManifestRow) -> Sample | None:
        """The sample of a row; None when it is not there, or cannot be read."""
        members = self._members.get(sample_key(row.id))
        if members is None or self._file is None:
            return None
        try:
            return self._sample(row, members)
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def __enter__(self) -> "ExistingSamples":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _sample(self, row: ManifestRow, members: tuple[Member, ...]) -> Sample | None:
        contents = {member.extension: member for member in members}
        metadata = SampleMetadata.from_json(sample_key(row.id), self._read(contents[METADATA_EXTENSION]))
        if metadata.id != row.id:
            return None
        for extension in VIDEO_EXTENSIONS:
            if (member := contents.get(extension)) is not None:
                return Sample(metadata, (), VideoFile(extension, self._window(member), member.size))
        frames = tuple(self._read(member) for member in members if is_frame(member.extension))
        return Sample(metadata, frames)

    def _read(self, member: Member) -> bytes:
        assert self._file is not None
        data = os.pread(self._file.fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise ValueError(f"{member.name} is cut off")
        return data

    def _window(self, member: Member) -> BinaryIO:
        assert self._file is not None
        return window_of(self._file.fileno(), member.offset, member.size)
