"""Duplicate ids and the digest of a manifest, in memory of 16 bytes a row, or 32 where ids repeat."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alpro_stream.manifest.rows import ManifestRow, RejectedRow

IDS_DTYPE = np.dtype("S16")
"""An id's digest. Such an array compares as bytes do; an item taken out of it lacks the zeros at its end."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over a manifest tells.

    Attributes:
        num_rows: rows, those that cannot be used included.
        digest: SHA-256 over all rows and rejections with their lines, in hexadecimal.
        ids: [num_usable] of `IDS_DTYPE`, digests of the ids in ascending order, an id that is there twice twice.
        repeated: [num_repeated] of `IDS_DTYPE`, the digests that are in `ids` more than once, each once, ascending.
    """

    num_rows: int
    digest: str
    ids: NDArray[np.bytes_]
    repeated: NDArray[np.bytes_]


def survey(rows: Iterable[ManifestRow | RejectedRow]) -> Survey:
    """Reads all rows once, and keeps 16 bytes of each, and 16 more of each id that is there more than once."""
    num_rows = 0
    digest = hashlib.sha256()
    held = bytearray()
    for row in rows:
        num_rows += 1
        digest.update(_canonical(row))
        if isinstance(row, ManifestRow):
            held += _id_digest(row.id)
    ids = np.frombuffer(held, dtype=IDS_DTYPE)
    ids.sort()  # in place: a copy would double what is held
    return Survey(num_rows, digest.hexdigest(), ids, _repeated(ids))


def refuse_repeated(
    rows: Iterable[ManifestRow | RejectedRow],
    repeated: NDArray[np.bytes_],
    earlier: Sequence[NDArray[np.bytes_]] = (),
) -> Iterator[ManifestRow | RejectedRow]:
    """Rejects rows whose id was used before; of rows with one id the first stands.

    Args:
        rows: the rows of the manifest.
        repeated: of its survey.
        earlier: `ids` of earlier manifests of the same shard set, such as memory-mapped files.
    """
    first_lines = np.zeros(len(repeated), np.int64)  # 0: not seen yet; lines are counted from 1
    for row in rows:
        if isinstance(row, ManifestRow):
            digest = _id_digest(row.id)
            if any(_position(ids, digest) is not None for ids in earlier):
                reason = f"id {row.id!r} is in this shard set already, from an earlier manifest"
                row = RejectedRow(row.line, row.id, reason)
            elif (position := _position(repeated, digest)) is not None:
                if first := first_lines[position]:
                    row = RejectedRow(row.line, row.id, f"duplicate id {row.id!r}: first used on line {first}")
                else:
                    first_lines[position] = row.line
        yield row


def _id_digest(row_id: str) -> bytes:
    return hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=IDS_DTYPE.itemsize).digest()


def _canonical(row: ManifestRow | RejectedRow) -> bytes:
    """One line of JSON, which is the same for the same row in every run."""
    if isinstance(row, RejectedRow):
        return json.dumps((row.line, row.id, row.reason)).encode() + b"\n"
    fields = (
        row.line,
        row.id,
        row.media,
        row.captions,
        row.qa,
        row.start_s,
        row.end_s,
        row.split,
        row.kind,
        row.byte_range,
        row.license,
    )
    return json.dumps(fields).encode() + b"\n"


def _repeated(ids: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Of sorted ids those that are there more than once, each once."""
    # Chosen before they are copied: copies of all that repeat could take as much as the ids themselves.
    chosen: NDArray[np.bool_] = ids[1:] == ids[:-1]
    chosen[1:] &= ~chosen[:-1]
    repeated: NDArray[np.bytes_] = ids[1:][chosen]
    return repeated


def _position(ids: NDArray[np.bytes_], digest: bytes) -> int | None:
    """Where a digest is in sorted ids; None when it is not there."""
    key = np.frombuffer(digest, dtype=IDS_DTYPE)
    position = int(np.searchsorted(ids, key)[0])
    return position if position < len(ids) and ids[position] == key[0] else None
