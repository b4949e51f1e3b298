"""The index of a shard, in DALI's format (``wds2idx`` v1.2), so that DALI's own reader can use it too.

The first line is ``v1.2 <number of samples>``; then one line a sample: ``extension offset size name`` of each member,
all separated by single spaces. Offsets are those of the contents, always a multiple of the tar block of 512 bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alpro_stream.errors import Cause, ShardError
from alpro_stream.manifest.webdataset import DamagedTarError, compression_problem, tar_samples
from alpro_stream.shards.sample import is_frame
from alpro_stream.shards.storage import publish_bytes

INDEX_VERSION = "v1.2"
_NEWLINE = ord("\n")


class Member(NamedTuple):
    """One file of a sample inside the tar."""

    extension: str
    offset: int
    size: int
    name: str


class SlotError(ShardError):
    """One slot of which the index does not say where it lies.

    Attributes:
        cause: see `Cause`.
    """

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause: Cause = cause


class ShardIndex:
    """Where each sample's members lie in the tar; lines are parsed when asked for.

    Args:
        data: contents of an index file.
        source: what the index is called in messages.
        num_cut: samples behind those of the index that a tar which was cut off does not hold any more.

    Raises:
        ShardError: another version, or not the number of samples that it states.
    """

    def __init__(self, data: bytes, source: str, num_cut: int = 0) -> None:
        header, _, lines = data.partition(b"\n")
        version, _, count = header.partition(b" ")
        if version != INDEX_VERSION.encode():
            raise ShardError(f"{source}: first line {header[:40]!r}, expected '{INDEX_VERSION} <number of samples>'")
        ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == _NEWLINE) + 1
        if not count.isdigit() or int(count) != len(ends) or lines[-1:] not in (b"", b"\n"):
            raise ShardError(
                f"{source}: {len(ends)} samples where its first line is {header[:40]!r}; it is cut off or damaged"
            )
        # As one text: an object a line would take half as much again.
        self._lines = lines
        self._edges = np.concatenate([[0], ends])
        self._num_cut = num_cut
        self._source = source

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        """Reads an index file.

        Raises:
            ShardError: it is missing, of another version, or does not hold the number of samples it states.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ShardError(f"cannot read the index {path}: {error.strerror or error}") from error
        return cls(data, str(path))

    def __len__(self) -> int:
        return len(self._edges) - 1 + self._num_cut

    def members(self, slot: int) -> tuple[Member, ...]:
        """All members of a sample, in the order they lie in the tar.

        Raises:
            SlotError: a damaged line, or a sample that the tar does not hold any more.
            ShardError: no such slot.
        """
        if not 0 <= slot < len(self):
            raise ShardError(f"{self._source}: no slot {slot}; it has {len(self)} samples")
        if slot >= len(self._edges) - 1:
            raise SlotError(f"{self._source}: cut off before slot {slot}", "truncated")
        line = self._lines[self._edges[slot] : self._edges[slot + 1] - 1]
        try:
            return _parsed(line.decode("utf-8").split(" "))
        except ValueError as error:
            raise SlotError(f"{self._source}: slot {slot} is damaged: {error}", "index") from error

    def key(self, slot: int) -> str:
        """The sample's key: the name of its members up to the first dot, without folders."""
        return key_of(self.members(slot))

    def keys(self) -> list[str]:
        """The key of every slot; empty where the index does not say what lies there."""
        fields = [line.split(b" ", 4) for line in self._lines.split(b"\n")[:-1]]
        names = [found[3].decode("utf-8", "replace") if len(found) > 3 else "" for found in fields]
        return [_key(name) for name in names] + [""] * self._num_cut

    def frame_members(self, slot: int) -> tuple[Member, ...]:
        """The members that are frames, in order."""
        return tuple(member for member in self.members(slot) if is_frame(member.extension))

    def num_frames(self, slot: int) -> int:
        """How many frames the sample stores."""
        return len(self.frame_members(slot))


def _parsed(fields: list[str]) -> tuple[Member, ...]:
    """The members of a line.

    Raises:
        ValueError: it is damaged.
    """
    if len(fields) % 4 or not fields[0]:
        raise ValueError("expected groups of extension, offset, size and name")
    extensions, names = fields[::4], fields[3::4]
    start = names[0].removesuffix(extensions[0])
    # Nearly always all names begin alike, which is seen at once.
    if not start.endswith(".") or names != [start + extension for extension in extensions]:
        for extension, name in zip(extensions, names, strict=True):
            if not name.endswith(f".{extension}"):
                raise ValueError(f"another extension than that of {name!r}")
    groups = zip(extensions, map(int, fields[1::4]), map(int, fields[2::4]), names, strict=True)
    return tuple(map(Member._make, groups))


def key_of(members: Sequence[Member]) -> str:
    """The key of the sample that these members are."""
    return _key(members[0].name)


def _key(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


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
        ShardError: not a tar, compressed, cut off or damaged, or members of a sample that do not follow each other.
    """
    samples, damage = grouped_members(path)
    if damage is not None:
        raise damaged_tar(path, damage) from damage
    return [members for members in samples if members]


def grouped_members(path: str | Path) -> tuple[list[tuple[Member, ...]], DamagedTarError | None]:
    """The members of each sample of a tar, and why there may be more; a sample may have none that can be read alone.

    Raises:
        ShardError: it cannot be opened, is compressed, or members of a sample do not follow each other.
    """
    samples: list[tuple[Member, ...]] = []
    keys: set[str] = set()
    try:
        with Path(path).open("rb") as file:
            if problem := compression_problem(file.read(8)):
                raise ShardError(f"{path} {problem}")
            try:
                for key, members in tar_samples(file):
                    if key in keys:
                        raise ShardError(
                            f"{path}: members of a sample must follow each other, and those of {key!r} lie apart; "
                            "write the tar again with its files sorted by name"
                        )
                    keys.add(key)
                    samples.append(tuple(Member(m.extension, m.offset, m.size, m.name) for m in members))
            except DamagedTarError as error:
                return samples, error
    except OSError as error:
        raise ShardError(f"{path} cannot be read as a tar: {error.strerror or error}") from error
    return samples, None


def damaged_tar(path: str | Path, damage: DamagedTarError) -> ShardError:
    """The error of a tar that cannot be read to its end."""
    return ShardError(f"{path} {damage}; fetch or write it again, or leave it out")
