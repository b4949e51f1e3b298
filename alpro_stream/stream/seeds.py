"""Random draws keyed by identity: the same name gives the same numbers in any process, order or version.

Counter-based: SplitMix64 (Steele et al. 2014) for the few numbers that a sample needs, Philox (Salmon et al. 2011) for
the order of samples. Only raw 64-bit words are taken from numpy: their stream is frozen, while the sampling methods of
`numpy.random.Generator` may change between releases.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
# From this many words on numpy is faster than plain integers.
_MANY = 16
# Enough for the samples of a batch: each is asked for with several purposes.
_MAX_KEPT = 4096


class Draws:
    """Numbers that depend on the identity alone, e.g. ``Draws("crop", seed, source, pass_index, key)``.

    They are those of `uniform_at` for the key that `sample_keys` gives to the same purpose and identity. Each call goes
    on where the one before ended.

    Args:
        purpose: what is drawn, so that two uses of an identity share no numbers.
        identity: integers and strings that name what it is drawn for; their order and types matter.
    """

    __slots__ = ("_state",)

    def __init__(self, purpose: int | str, *identity: int | str) -> None:
        self._state = _mix(_key(*identity) + _constant(purpose) & _MASK)

    def word(self) -> int:
        """One raw word, uniform over 64 bits."""
        # Plain integers: an array of one number costs several times as much, and a clip needs a dozen of them.
        self._state = (self._state + _GAMMA) & _MASK
        return _mix(self._state)

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` raw words."""
        if count < _MANY:
            return np.array([self.word() for _ in range(count)], dtype=np.uint64)
        words = _mixed(np.uint64(self._state) + _steps(count))
        self._state = (self._state + count * _GAMMA) & _MASK
        return words

    def scalar(self) -> float:
        """One uniform value in [0, 1) with 53 random bits; that of ``uniform(1)``, and cheaper."""
        return (self.word() >> 11) * 2.0**-53

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Uniform values in [0, 1) with 53 random bits."""
        count = math.prod(shape)
        if count < _MANY:
            return np.array([self.scalar() for _ in range(count)], dtype=np.float64).reshape(shape)
        return _unit_interval(self.words(count)).reshape(shape)

    def exponential(self, *shape: int) -> NDArray[np.float64]:
        """Exponential values of rate 1."""
        return np.asarray(-np.log1p(-self.uniform(*shape)), dtype=np.float64)

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return self.word() * high >> 64

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniformly random order of ``range(count)``."""
        return np.argsort(self.words(count), kind="stable")

    def distinct(self, count: int, high: int) -> list[int]:
        """`count` different integers in [0, high), ascending; every such set is equally likely (Floyd 1987)."""
        chosen: set[int] = set()
        for top in range(high - count, high):
            number = self.integer(top + 1)
            chosen.add(top if number in chosen else number)
        return sorted(chosen)


def random_order(count: int, *identity: int | str) -> NDArray[np.int64]:
    """A uniformly random order of ``range(count)`` for what is planned: its numbers stay, whatever becomes of `Draws`.

    Args:
        count: of any size.
        identity: as for `Draws`, and apart from it.
    """
    bits = np.random.Philox(key=int.from_bytes(_digest(identity, 16), "little"))
    return np.argsort(np.asarray(bits.random_raw(count), dtype=np.uint64), kind="stable")


def sample_keys(identities: Sequence[tuple[int | str, ...]], purpose: str) -> NDArray[np.uint64]:
    """One key a sample for `uniform_at`: what is drawn for a sample does not depend on its companions.

    Args:
        identities: integers and strings that name each sample; their order and types matter.
        purpose: what is drawn, so that two uses of a sample share no numbers.

    Returns:
        (B,) uint64.
    """
    keys_B = np.array([_key(*identity) for identity in identities], dtype=np.uint64)
    return _mixed(keys_B + np.uint64(_constant(purpose)))


def uniform_at(keys_B: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """The first `count` numbers of every key, all at once: uniform in [0, 1), with 53 random bits.

    Args:
        keys_B: from `sample_keys`. The keys must be random themselves: those that lie a multiple of SplitMix64's
            constant apart give the same numbers, shifted.
        count: numbers a key; number i is the same whatever the count.

    Returns:
        (B, count) float64.
    """
    return _unit_interval(_mixed(keys_B[:, None] + _steps(count)))


def _steps(count: int) -> NDArray[np.uint64]:
    """What the words 1 to `count` add to a key."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)


@lru_cache(maxsize=_MAX_KEPT, typed=True)
def _key(*identity: int | str) -> int:
    return int.from_bytes(_digest(identity, 8), "little")


@lru_cache(maxsize=_MAX_KEPT, typed=True)
def _constant(purpose: int | str) -> int:
    # Mixed once more, so that a purpose and an identity of the same names may change places.
    return _mix(_key(purpose))


def _mix(word: int) -> int:
    """SplitMix64's function of a word, one to one; `_mixed` for many."""
    word = (word ^ word >> 30) * _FIRST_FACTOR & _MASK
    word = (word ^ word >> 27) * _SECOND_FACTOR & _MASK
    return word ^ word >> 31


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Of 64 bits all arithmetic is modulo 2**64, as SplitMix64 wants it: value i is mix(key + (i + 1) * gamma).
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
    return words ^ (words >> np.uint64(31))


def _digest(identity: tuple[int | str, ...], num_bytes: int) -> bytes:
    # JSON: no two identities share a text, whatever the names contain, and other types are refused.
    text = f"[{', '.join(map(_json, identity))}]"
    return hashlib.blake2b(text.encode("ascii"), digest_size=num_bytes).digest()


def _json(part: int | str) -> str:
    """What ``json.dumps`` gives, without the encoder that it makes for every call."""
    if type(part) is str:
        return encode_basestring_ascii(part)
    return str(part) if type(part) is int else json.dumps(part)


def _unit_interval(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
