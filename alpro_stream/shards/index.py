"""The index of a shard, in DALI's format (``wds2idx`` v1.2), so that DALI's own reader can use it too.

The first line is ``v1.2 <number of samples>``; then one line a sample: ``extension offset size name`` of each member,
all separated by single spaces. Offsets are those of the contents, always a multiple of the tar block of 512 bytes.
"""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from alpro_stream.errors import ShardError
from alpro_stream.shards.sample import is_frame
from alpro_stream.shards.storage import publish_bytes

INDEX_VERSION = "v1.2"


class Member(NamedTuple):
    """One file of a sample inside the tar."""

    extension: str
    offset: int
    size: int
    name: str


class ShardIndex:
    """Where each sample's members lie in the tar; lines are parsed when asked for."""

    def __init__(self, lines: Sequence[bytes], source: str) -> None:
        self._lines = lines
        self._source = source

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        """Reads an index file.

        Raises:
            ShardError: it is missing, of another version, or does not hold the number of samples it states.
        """
        try:
            header, *lines = Path(path).read_bytes().splitlines() or [b""]
        except OSError as error:
            raise ShardError(f"cannot read the index {path}: {error.strerror or error}; shard again") from error
        version, _, count = header.partition(b" ")
        if version != INDEX_VERSION.encode():
            raise ShardError(f"{path}: first line {header[:40]!r}, expected '{INDEX_VERSION} <number of samples>'")
        if not count.isdigit() or int(count) != len(lines):
            raise ShardError(
                f"{path}: {len(lines)} samples where its first line is {header!r}; it is cut off or damaged"
            )
        return cls(lines, str(path))

    def __len__(self) -> int:
        return len(self._lines)

    def members(self, slot: int) -> tuple[Member, ...]:
        """All members of a sample, in the order they lie in the tar.

        Raises:
            ShardError: no such slot, or a damaged line.
        """
        if not 0 <= slot < len(self._lines):
            raise ShardError(f"{self._source}: no slot {slot}; it has {len(self._lines)} samples")
        fields = self._lines[slot].decode("utf-8", "replace").split(" ")
        try:
            if len(fields) % 4 or not fields[0]:
                raise ValueError("expected groups of extension, offset, size and name")
            groups = zip(fields[::4], fields[1::4], fields[2::4], fields[3::4], strict=True)
            return tuple(Member(extension, int(offset), int(size), name) for extension, offset, size, name in groups)
        except ValueError as error:
            raise ShardError(f"{self._source}: slot {slot} is damaged: {error}") from error

    def key(self, slot: int) -> str:
        """The sample's key."""
        return self.members(slot)[0].name.rpartition("/")[2].partition(".")[0]

    def frame_members(self, slot: int) -> tuple[Member, ...]:
        """The members that are frames, in order."""
        return tuple(member for member in self.members(slot) if is_frame(member.extension))

    def num_frames(self, slot: int) -> int:
        """How many frames the sample stores."""
        return len(self.frame_members(slot))


def format_index(samples: Sequence[Sequence[Member]]) -> bytes:
    """The contents of an index file."""
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    return ("\n".join(lines) + "\n").encode("utf-8")


def write_index(path: Path, samples: Sequence[Sequence[Member]]) -> None:
    """Writes an index file atomically."""
    publish_bytes(path, format_index(samples))


def index_tar(path: str | Path) -> list[tuple[Member, ...]]:
    """Reads the members of a tar, grouped into samples as WebDataset does: neighbours with the same key.

    Raises:
        ShardError: not a tar, or cut off.
    """
    try:
        with tarfile.open(path, mode="r:") as tar:
            return _group((info.name, info.offset_data, info.size) for info in tar if info.isfile())
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{path} cannot be read as a tar: {error}") from error


def _group(files: Iterable[tuple[str, int, int]]) -> list[tuple[Member, ...]]:
    samples: list[tuple[str, list[Member]]] = []
    for name, offset, size in files:
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # a hidden file, or one without extension, belongs to no sample
        key = f"{folder}{slash}{stem}"
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        samples[-1][1].append(Member(extension, offset, size, name))
    return [tuple(members) for _, members in samples]
