"""Whether a tar holds a member where its index says, by the header in front of the contents."""

import tarfile
from collections.abc import Iterator
from zlib import adler32

from alpro_stream.shards.index import Member
from alpro_stream.shards.sample import TAR_BLOCK_BYTES

_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
_FILE_TYPES = (b"0", b"\0", b"7")
# Sizes from 8 GiB on do not fit the header of a pax tar, which writes 0 there and the size elsewhere.
_LARGEST_OCTAL = 8**11 - 1
_LONGEST_NAME = 100
# What `ShardWriter` writes for an empty file without a name, and the sum of its bytes but those of the size.
_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_EMPTY_SUM = sum(_EMPTY) - sum(_EMPTY[_CHECKSUM]) + 8 * ord(" ") - sum(_EMPTY[_SIZE])


def header_problem(header: bytes, member: Member) -> str | None:
    """What is wrong, in a sentence; None when the header is that of the member.

    Names that are long or not ASCII lie elsewhere in tars of the GNU and pax formats, and are not compared.

    Args:
        header: the block of 512 bytes in front of where the contents should lie.
        member: what the index says of it.
    """
    if member.name.isascii() and header == own_header(member):
        return None
    where = f"at byte {member.offset - TAR_BLOCK_BYTES} the index has {member.name!r}"
    try:
        checksum, size = _number(header[_CHECKSUM]), _number(header[_SIZE])
    except ValueError:
        checksum, size = -1, 0
    if checksum not in _sums(header):
        return f"{where}, and the tar has no header there, or a damaged one"
    if header[156:157] not in _FILE_TYPES:
        return f"{where}, and the tar has something there that is no file (type {header[156:157]!r})"
    if size != member.size and not (size == 0 and member.size > _LARGEST_OCTAL):
        return f"{where} with {member.size} bytes, and the tar has {size}"
    found = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        found = prefix + b"/" + found
    if len(member.name) <= _LONGEST_NAME and member.name.isascii() and found != member.name.encode():
        return f"{where}, and the tar has {found.decode('ascii', 'backslashreplace')!r}"
    return None


def own_header(member: Member) -> bytes:
    """What `ShardWriter` writes in front of a member with a short name of ASCII.

    To make it and compare is several times as fast as to parse what is there.
    """
    name, size = member.name.encode("ascii"), b"%011o\0" % member.size
    # The lower half of Adler-32 is the sum of so few bytes, in a fifth of the time of `sum`.
    checksum = _EMPTY_SUM + (adler32(name + size, 0) & 0xFFFF)
    return b"".join(
        (name.ljust(_LONGEST_NAME, b"\0"), _EMPTY[100:124], size, _EMPTY[136:148], b"%06o\0 " % checksum, _EMPTY[156:])
    )


def _sums(header: bytes) -> Iterator[int]:
    """What a checksum may be: the sum of all bytes, with spaces in its own place; in some old tars they have signs."""
    others = header[:148] + b" " * 8 + header[156:]
    yield sum(others)
    yield sum(others) - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or bytes with the highest bit of the first one set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(_text(field).strip() or b"0", 8)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]
