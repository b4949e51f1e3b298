"""Random draws keyed by identity: the same name gives the same numbers in any process, order or version.

Counter-based (Philox, Salmon et al. 2011). Only raw 64-bit words are taken from numpy: their stream is
frozen, while the sampling methods of `numpy.random.Generator` may change between releases.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


class Draws:
    """Numbers that depend on the identity alone, e.g. ``Draws(seed, "crop", source, pass_index, key)``.

    Args:
        identity: integers and strings that name what is drawn; their order and types matter.
    """

    def __init__(self, *identity: int | str) -> None:
        # JSON: no two identities share a text, whatever the names contain, and other types are refused.
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` raw words, uniform over 64 bits."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Uniform values in [0, 1) with 53 random bits."""
        words = self.words(int(np.prod(shape, dtype=np.int64)))
        return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)

    def exponential(self, *shape: int) -> NDArray[np.float64]:
        """Exponential values of rate 1."""
        return np.asarray(-np.log1p(-self.uniform(*shape)), dtype=np.float64)

    def integer(self, high: int) -> int:
        """One integer in [0, high)."""
        return int(self.uniform(1)[0] * high)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniformly random order of ``range(count)``."""
        return np.argsort(self.words(count), kind="stable")
