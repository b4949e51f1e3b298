"""WebDataset tars, as video2dataset and img2dataset write them: ``key.mp4``, ``key.txt``, ``key.json``.

Only headers and captions are read here; a row says where in its tar the medium lies.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.columns import Entry
from alpro_stream.manifest.lines import cannot_read
from alpro_stream.manifest.places import manifest_folder
from alpro_stream.manifest.rows import IMAGE_SUFFIXES, MAX_TEXT_BYTES, VIDEO_SUFFIXES, BadFieldError, RejectedRow
from alpro_stream.manifest.sidecar import METADATA_SUFFIX, TEXT_SUFFIX, sidecar_values

_TAR_NAME = re.compile(r".*\.(tar|tgz|tar\.(gz|bz2|xz|zst))")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BLOCK_BYTES = tarfile.BLOCKSIZE
_TAIL_BYTES = 1 << 16
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OUR_KEYS = {"captions", "qa", "frame_timestamps_s", "source"}


class _Named(Protocol):
    @property
    def extension(self) -> str: ...


T = TypeVar("T", bound=_Named)


class TarMember(NamedTuple):
    """A file in a tar: its name, what follows the first dot of it, and where its contents lie, in bytes."""

    name: str
    extension: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """What tells the medium: ``.mp4`` also for ``MP4``."""
        return f".{self.extension.lower()}"


class DamagedTarError(Exception):
    """The rest of a tar cannot be read.

    Attributes:
        cut_off: whether the file just ends too early.
    """

    def __init__(self, message: str, *, cut_off: bool = False) -> None:
        super().__init__(message)
        self.cut_off = cut_off


class OwnShardError(ManifestError):
    """A tar that `alpro shard` made, where one of another tool was expected."""


def is_tar_name(name: str) -> bool:
    """Whether a file name is that of a tar, compressed ones included (they are refused later, with a reason)."""
    return _TAR_NAME.fullmatch(name.lower()) is not None


def tar_entries(path: str | Path) -> Iterator[Entry | RejectedRow]:
    """The samples of a tar, of all tars in a folder, or of those that a pattern names, in order.

    Args:
        path: a tar, a folder, or a pattern with ``{00000..00123}``, ``{a,b}`` or ``*``.

    Raises:
        ManifestError: no tar, one that cannot be opened or is compressed, or a shard of this project.
    """
    root = manifest_folder(path)
    number = 0
    for tar in tar_paths(path):
        name = tar.absolute().relative_to(root).as_posix()
        try:
            with tar.open("rb") as file:
                _refuse_compressed(tar, file.read(8))
                descriptor = file.fileno()
                try:
                    for key, members in tar_samples(file):
                        number += 1
                        yield _entry(number, key, members, name, tar, descriptor)
                except DamagedTarError as error:
                    number += 1
                    yield RejectedRow(number, None, f"{name} {error}")
        except OSError as error:
            raise cannot_read(tar, error) from error


def _entry(
    line: int, key: str, members: Sequence[TarMember], name: str, tar: Path, descriptor: int
) -> Entry | RejectedRow:
    by_suffix = {member.suffix: member for member in members}
    if len(by_suffix) < len(members):
        twice = next(member for member in members if by_suffix[member.suffix] is not member)
        return RejectedRow(line, key, f"{name} holds {twice.name} twice, and which one is meant cannot be told")
    text, metadata = (_contents(descriptor, by_suffix.get(suffix)) for suffix in (TEXT_SUFFIX, METADATA_SUFFIX))
    try:
        values = sidecar_values(text, metadata, one_a_line=False)
    except BadFieldError as error:
        return RejectedRow(line, key, f"{error} (in {name})")
    if values.keys() >= _OUR_KEYS:
        raise OwnShardError(f"{tar} is a shard that `alpro shard` made; stream from it as it is")
    medium = medium_of(members)
    if medium is None:
        found = ", ".join(f"{key}{member.suffix}" for member in members)
        return RejectedRow(line, key, f"no video or image in {name}: it has {found[:100]}")
    kind = "video" if medium.suffix in VIDEO_SUFFIXES else "image"
    values = {**values, "key": key, "tar": tar.stem, "media": name, "kind": kind}
    return Entry(line, values, (medium.offset, medium.size))


def medium_of(members: Sequence[T]) -> T | None:
    """The member that is a sample's medium: the first video, else the first image; None when there is neither."""
    for suffixes in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):  # a picture beside a video is its thumbnail
        for member in members:
            if f".{member.extension.lower()}" in suffixes:
                return member
    return None


def tar_samples(file: Any) -> Iterator[tuple[str, list[TarMember]]]:
    """Key (with its folder) and members of each sample of an open tar: neighbours with the same key.

    What is no file (a folder, a link, a device), hidden, or without extension belongs to no sample. Names are only
    compared, never opened or followed.

    Raises:
        DamagedTarError: at the end of what can be read; the sample there is not given.
    """
    current: str | None = None
    members: list[TarMember] = []
    for info in _headers(file):
        folder, _, name = info.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not info.isreg() or not stem or not dot:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, []
        if not info.issparse():  # its contents do not lie in one piece
            members.append(TarMember(info.name, extension, info.offset_data, info.size))
    if current is not None:
        yield current, members


def _headers(file: Any) -> Iterator[tarfile.TarInfo]:
    """The headers of all members whose contents are there in full.

    Raises:
        DamagedTarError: the file ends early, has a damaged header, or is no tar.
    """
    file_size = os.fstat(file.fileno()).st_size
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all, which is much
                end = info.offset_data + info.size
                if info.size < 0:  # it would lead back to where we were
                    raise DamagedTarError(f"is damaged at byte {info.offset}: a size of {info.size} bytes")
                if end > file_size:
                    raise DamagedTarError(f"is cut off at byte {file_size}, inside of {info.name!r}", cut_off=True)
                yield info
            # A header that is cut off or damaged looks like the end, which is a block of zeros.
            if os.pread(file.fileno(), _BLOCK_BYTES, tar.offset) != bytes(_BLOCK_BYTES):
                cut_off = tar.offset + _BLOCK_BYTES > file_size
                raise DamagedTarError(f"is cut off or damaged at byte {tar.offset}", cut_off=cut_off)
            # And so does one that was overwritten with zeros; but behind the end there are only more of them.
            for position in range(tar.offset, file_size, _TAIL_BYTES):
                if os.pread(file.fileno(), _TAIL_BYTES, position).strip(b"\0"):
                    raise DamagedTarError(f"is damaged at byte {tar.offset}: files follow what looks like its end")
    except (tarfile.TarError, ValueError, RecursionError) as error:
        cut_off = isinstance(error, tarfile.ReadError) and "unexpected end of data" in str(error)
        raise DamagedTarError(f"is cut off or damaged behind byte {end}: {error}", cut_off=cut_off) from error


def _contents(descriptor: int, member: TarMember | None) -> bytes | None:
    """The beginning of a member, one byte more than is allowed."""
    if member is None:
        return None
    return os.pread(descriptor, min(member.size, MAX_TEXT_BYTES + 1), member.offset)


def tar_paths(path: str | Path) -> list[Path]:
    """The tars that a path names: one, all in a folder, or those of a pattern, in order.

    Raises:
        ManifestError: there are none.
    """
    path = str(path)
    place = Path(path)
    if place.is_dir():
        tars = sorted(child for child in place.iterdir() if is_tar_name(child.name) and not child.name.startswith("."))
        problem = "holds no tars"
    elif place.exists():
        return [place]
    else:
        tars = [tar for one in _expanded(path) for tar in _globbed(one)]
        problem = "names no file"
    if not tars:
        expected = "expected a tar, a folder of tars, or a pattern such as {00000..00123}.tar"
        raise ManifestError(f"{path} {problem}; {expected}")
    return tars


def _expanded(pattern: str) -> Iterator[str]:
    """The texts that a pattern with braces stands for, in order."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = numbers[1], numbers[2]
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expanded(f"{pattern[: match.start()]}{choice}{pattern[match.end() :]}")


def _globbed(place: str) -> list[Path]:
    if glob.has_magic(place):
        return sorted(Path(found) for found in glob.glob(place))  # noqa: PTH207 (patterns may be absolute)
    if not Path(place).is_file():
        raise ManifestError(f"no such tar: {place}; correct the pattern, or fetch what is missing")
    return [Path(place)]


def _refuse_compressed(tar: Path, start: bytes) -> None:
    if problem := compression_problem(start):
        raise ManifestError(f"{tar} {problem}")


def compression_problem(start: bytes) -> str | None:
    """What is wrong with a tar that begins with these bytes, and what to do; None when it is not compressed."""
    for signature, name in _COMPRESSED.items():
        if start.startswith(signature):
            return f"is compressed ({name}), so that its members cannot be read alone; unpack it to a plain .tar"
    return None
