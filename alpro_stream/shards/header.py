"""Whether a tar holds a member where its index says, by the header in front of the contents."""

from collections.abc import Iterator

from alpro_stream.shards.index import Member
from alpro_stream.shards.sample import TAR_BLOCK_BYTES

_CHECKSUM = slice(148, 156)
_FILE_TYPES = (b"0", b"\0", b"7")
# Sizes from 8 GiB on do not fit the header of a pax tar, which writes 0 there and the size elsewhere.
_LARGEST_OCTAL = 8**11 - 1
_LONGEST_NAME = 100


def header_problem(header: bytes, member: Member) -> str | None:
    """What is wrong, in a sentence; None when the header is that of the member.

    Names that are long or not ASCII lie elsewhere in tars of the GNU and pax formats, and are not compared.

    Args:
        header: the block of 512 bytes in front of where the contents should lie.
        member: what the index says of it.
    """
    where = f"at byte {member.offset - TAR_BLOCK_BYTES} the index has {member.name!r}"
    try:
        checksum, size = _number(header[_CHECKSUM]), _number(header[124:136])
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
