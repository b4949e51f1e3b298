"""Writes a shard: tar and index, the same bytes for the same samples, visible only when complete."""

import hashlib
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from alpro_stream.errors import ShardError, WriteError
from alpro_stream.manifest import Kind
from alpro_stream.shards.index import Member, format_index
from alpro_stream.shards.layout import ShardInfo, index_path, tar_path
from alpro_stream.shards.sample import TAR_BLOCK_BYTES, Sample
from alpro_stream.shards.storage import publish, publish_bytes, temporary_beside


class ShardWriter:
    """Writes samples of one kind into ``<directory>/<name>.tar`` and its index.

    Used as a context manager, it removes the unfinished file when the block raises. `close` publishes the tar first
    and the index last: a shard with an index is complete.
    """

    def __init__(self, directory: str | Path, name: str, kind: Kind) -> None:
        self._directory = Path(directory)
        self._name = name
        self._kind: Kind = kind
        self._samples: list[tuple[Member, ...]] = []
        self._keys: set[str] = set()
        self._num_captions = 0
        self._num_questions = 0
        self._temporary = temporary_beside(tar_path(self._directory, name))
        try:
            self._file: _HashingFile = _HashingFile(self._temporary)
        except OSError as error:
            raise self._explain(error) from error
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: Sample) -> None:
        """Appends a sample.

        Raises:
            ShardError: another kind or a key that is there already, or the disk refuses the write.
        """
        metadata = sample.metadata
        if metadata.kind != self._kind:
            raise ShardError(
                f"{self._name}: sample {metadata.key} is of kind {metadata.kind}, the shard of {self._kind}"
            )
        if metadata.key in self._keys:
            raise ShardError(f"{self._name}: two samples with the key {metadata.key}")
        try:
            members = [
                self._add_member(f"{metadata.key}.{extension}", extension, size, contents)
                for extension, size, contents in sample.members()
            ]
        except OSError as error:
            raise self._explain(error) from error
        self._keys.add(metadata.key)
        self._samples.append(tuple(members))
        self._num_captions += len(metadata.captions)
        self._num_questions += len(metadata.qa)

    def finish(self) -> str:
        """Completes the tar without publishing it, and returns its SHA-256; `close` publishes it.

        Raises:
            ShardError: as `close`.
        """
        if not self._samples:
            self.abort()
            raise ShardError(f"{self._name}: a shard needs at least one sample")
        try:
            if not self._tar.closed:
                self._tar.close()
                self._file.close()
        except OSError as error:
            self.abort()
            raise self._explain(error) from error
        return self._file.sha256

    def close(self) -> ShardInfo:
        """Publishes tar and index and returns their description.

        Raises:
            ShardError: no sample was added, or the disk refuses the write; nothing is published then.
        """
        sha256 = self.finish()
        index = format_index(self._samples)
        try:
            publish(self._temporary, tar_path(self._directory, self._name))
            publish_bytes(index_path(self._directory, self._name), index)
        except OSError as error:
            self.abort()
            raise self._explain(error) from error
        return ShardInfo(
            name=self._name,
            kind=self._kind,
            num_samples=len(self._samples),
            num_captions=self._num_captions,
            num_questions=self._num_questions,
            num_bytes=self._file.tell(),
            sha256=sha256,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Drops what was written."""
        self._file.discard()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()

    def _add_member(self, name: str, extension: str, size: int, contents: BinaryIO) -> Member:
        # A fresh TarInfo carries no owner and no time, so equal samples give equal bytes.
        info = tarfile.TarInfo(name)
        info.size = size
        offset = self._tar.offset + TAR_BLOCK_BYTES
        self._tar.addfile(info, contents)
        return Member(extension, offset, size, name)

    def _explain(self, error: OSError) -> WriteError:
        return WriteError(f"cannot write {tar_path(self._directory, self._name)}: {error.strerror or error}")


class _HashingFile:
    """A file for writing only, which computes its digest on the way."""

    def __init__(self, path: Path) -> None:
        self._raw: Any = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._num_bytes += len(data)
        return int(self._raw.write(data))

    def tell(self) -> int:
        return self._num_bytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()

    def discard(self) -> None:
        """Closes without caring whether the buffered rest still fits the disk."""
        try:
            self._raw.close()
        except OSError:
            self._raw.raw.close()
