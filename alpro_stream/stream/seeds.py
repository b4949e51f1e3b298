"""Random draws keyed by identity: the same name gives the same numbers in any process, order or version.

Counter-based: Philox (Salmon et al. 2011) for what belongs to one name, SplitMix64 (Steele et al. 2014) where many
names each need a few numbers at once. Only raw 64-bit words are taken from numpy: their stream is frozen, while the
sampling methods of `numpy.random.Generator` may change between releases.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Draws:
    """Numbers that depend on the identity alone, e.g. ``Draws(seed, "crop", source, pass_index, key)``.

    Args:
        identity: integers and strings that name what is drawn; their order and types matter.
    """

    def __init__(self, *identity: int | str) -> None:
        self._bits = np.random.Philox(key=int.from_bytes(_digest(identity, 16), "little"))

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` raw words, uniform over 64 bits."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Uniform values in [0, 1) with 53 random bits."""
        return _unit_interval(self.words(int(np.prod(shape, dtype=np.int64)))).reshape(shape)

    def exponential(self, *shape: int) -> NDArray[np.float64]:
        """Exponential values of rate 1."""
        return np.asarray(-np.log1p(-self.uniform(*shape)), dtype=np.float64)

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.uniform(1)[0] * high)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniformly random order of ``range(count)``."""
        return np.argsort(self.words(count), kind="stable")


def sample_keys(identities: Sequence[tuple[int | str, ...]], purpose: str) -> NDArray[np.uint64]:
    """One key a sample for `uniform_at`: what is drawn for a sample does not depend on its companions.

    Args:
        identities: integers and strings that name each sample; their order and types matter.
        purpose: what is drawn, so that two uses of a sample share no numbers.

    Returns:
        (B,) uint64.
    """
    digests = b"".join(_digest((purpose, *identity), 8) for identity in identities)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def uniform_at(keys_B: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """The first `count` numbers of every key, all at once: uniform in [0, 1), with 53 random bits.

    Args:
        keys_B: from `sample_keys`. The keys must be random themselves: those that lie a multiple of SplitMix64's
            constant apart give the same numbers, shifted.
        count: numbers a key; number i is the same whatever the count.

    Returns:
        (B, count) float64.
    """
    # Of 64 bits all arithmetic is modulo 2**64, as SplitMix64 wants it: value i is mix(key + (i + 1) * gamma).
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = keys_B[:, None] + steps
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _unit_interval(words ^ (words >> np.uint64(31)))


def _digest(identity: tuple[int | str, ...], num_bytes: int) -> bytes:
    # JSON: no two identities share a text, whatever the names contain, and other types are refused.
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=num_bytes).digest()


def _unit_interval(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
