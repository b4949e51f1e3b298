"""The rows of an index that are nearest to a query. Legend: N rows, E projection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError

Nearest = tuple[list[int], list[float]]
"""Numbers of rows and their inner products with the query, best first; equal ones in the order of their rows."""


def nearest(features: Sequence[Tensor], query_E: Tensor, top: int) -> Nearest:
    """Exact search: the inner product of the query with every row.

    Args:
        features: the rows in blocks, (n, E) each, float32 or float16, on a CPU; one block is read after the other.
        query_E: float32.
        top: rows wanted; all, where there are fewer.
    """
    # One room for all blocks of float16: memory that is had anew for each costs more than the search.
    room_NE = torch.empty(max(map(len, features)), len(query_E))
    scores_N = torch.cat([_as_float32(block_NE, room_NE) @ query_E for block_NE in features])
    least = scores_N.topk(min(top, len(scores_N))).values[-1]
    # topk takes any of equal scores; here those of the first rows are taken.
    rows = (scores_N >= least).nonzero()[:, 0]
    order = scores_N[rows].argsort(descending=True, stable=True)[:top]
    return rows[order].tolist(), scores_N[rows[order]].tolist()


def _as_float32(block_NE: Tensor, room_NE: Tensor) -> Tensor:
    return block_NE if block_NE.dtype == torch.float32 else room_NE[: len(block_NE)].copy_(block_NE)


class FaissIndex:
    """The same by FAISS's `IndexFlatIP`: all rows in memory, as float32.

    Equal to `nearest` but for rounding, and for the order of rows with equal scores.

    Raises:
        ConfigError: FAISS is not installed.
    """

    def __init__(self, features: Sequence[Tensor]) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ConfigError(
                "--faiss needs FAISS, which is not installed here: pip install faiss-cpu. The search without it is "
                "exact too, and finds the same"
            ) from error
        self._index: Any = faiss.IndexFlatIP(features[0].shape[1])
        for block_NE in features:
            self._index.add(block_NE.float().numpy())

    def nearest(self, query_E: Tensor, top: int) -> Nearest:
        """See the function of this name."""
        scores, rows = self._index.search(query_E[None].numpy(), min(top, self._index.ntotal))
        return rows[0].tolist(), scores[0].tolist()
