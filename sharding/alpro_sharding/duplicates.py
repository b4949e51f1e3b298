"""Samples that repeat an earlier one: by hashes of media and captions that workers gather on the way."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Little-endian on every machine: workers and driver need not be alike.
_HASH_DTYPE = np.dtype("<u8")
_HASH_BYTES = 8
# Samples looked at together when positions are gathered; what this needs does not count beside millions of samples.
_BLOCK = 1 << 16


def media_hash(sha256_hex: str, start_s: float | None, end_s: float | None) -> int:
    """A 64-bit hash of a clip: the same for the same bytes and the same segment of them.

    Two of ten million different clips get the same hash by chance once in 300,000 corpora.
    """
    return _hash(f"{sha256_hex.lower()} {_seconds(start_s)} {_seconds(end_s)}")


def captions_hash(captions: Iterable[str]) -> int:
    """A 64-bit hash of a set of captions; their order, repetition, case and white space do not count."""
    return _hash("\n".join(sorted({" ".join(caption.casefold().split()) for caption in captions})))


class SampleHashes:
    """The hashes of a shard's samples, in their order; stored as a little-endian uint64 array [num_samples, 2]."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def __len__(self) -> int:
        return len(self._hashes) // 2

    def add(self, media: int, captions: int) -> None:
        """Adds the next sample's `media_hash` and `captions_hash`."""
        self._hashes.extend((media, captions))

    def to_bytes(self) -> bytes:
        """16 bytes a sample, which `from_bytes` reads."""
        return np.asarray(self._hashes, dtype=_HASH_DTYPE).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SampleHashes":
        """The inverse of `to_bytes`.

        Raises:
            ValueError: the bytes are cut off.
        """
        if len(data) % (2 * _HASH_BYTES):
            raise ValueError(f"{len(data)} bytes of hashes, expected a multiple of {2 * _HASH_BYTES}; it is cut off")
        hashes = cls()
        hashes._hashes.frombytes(np.frombuffer(data, dtype=_HASH_DTYPE).astype(np.uint64).tobytes())
        return hashes

    def columns(self) -> NDArray[np.uint64]:
        """The hashes as an array [num_samples, 2]: media, captions."""
        return np.frombuffer(self._hashes, dtype=np.uint64).reshape(-1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Repeated:
    """Samples that equal an earlier one; iterating gives pairs (later, first) of sample numbers.

    Attributes:
        later: uint32 [num_repeated], numbers of the samples, ascending.
        first: uint32 [num_repeated], for each of these the number of the first sample that it equals.
    """

    later: NDArray[np.uint32]
    first: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.later)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((int(later), int(first)) for later, first in zip(self.later, self.first, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Repeats:
    """The samples of a split that repeat an earlier one.

    Attributes:
        media: by the bytes of the media and the segment.
        captions: by the set of captions.
    """

    media: Repeated
    captions: Repeated


def find_repeats(shards: Iterable[SampleHashes]) -> Repeats:
    """Finds the samples that repeat an earlier one; the first in the order given stays.

    Needs at most 32 bytes of memory a sample, whatever repeats.

    Args:
        shards: hashes of all shards in canonical order; a sample's number counts from the first sample of the first.
    """
    # `array` grows in place, which lists of small arrays that are joined later would not.
    media, captions = array("Q"), array("Q")
    for shard in shards:
        columns = shard.columns()
        media.frombytes(columns[:, 0].tobytes())
        captions.frombytes(columns[:, 1].tobytes())
    by_media = _repeated(np.frombuffer(media, dtype=np.uint64))
    del media
    return Repeats(by_media, _repeated(np.frombuffer(captions, dtype=np.uint64)))


def _repeated(hashes: NDArray[np.uint64]) -> Repeated:
    values, num_later = _repeated_values(hashes)
    later = np.empty(num_later, dtype=np.uint32)
    first_later = np.empty(num_later, dtype=np.uint32)
    if not num_later:
        return Repeated(later, first_later)
    first = np.full(len(values), np.iinfo(np.uint32).max, dtype=np.uint32)  # of each value
    num_found = 0
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        ranks = np.searchsorted(values, block)
        ranks[ranks == len(values)] = 0
        (places,) = np.nonzero(values[ranks] == block)
        ranks, numbers = ranks[places], (places + start).astype(np.uint32)
        np.minimum.at(first, ranks, numbers)
        is_later = first[ranks] != numbers
        end = num_found + int(is_later.sum())
        later[num_found:end] = numbers[is_later]
        first_later[num_found:end] = first[ranks[is_later]]
        num_found = end
    return Repeated(later, first_later)


def _repeated_values(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], int]:
    """The values that occur more than once, ascending, and how many occurrences follow a first one."""
    ordered = hashes.copy()
    ordered.sort()
    equals_previous = np.zeros(len(ordered) + 1, dtype=bool)
    np.equal(ordered[1:], ordered[:-1], out=equals_previous[1:-1])
    # A run of equal values starts where a value differs from the one before it and equals the one after it.
    starts = equals_previous[1:] & ~equals_previous[:-1]
    return ordered[starts], int(equals_previous.sum())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest(), "little")


def _seconds(seconds: float | None) -> str:
    # 2 and 2.0 are the same time.
    return "-" if seconds is None else repr(float(seconds))
