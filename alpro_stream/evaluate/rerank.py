"""Re-ranking: VTC chooses, VTM orders what is chosen. Legend: Q queries, N candidates."""

import torch
from torch import Tensor

from alpro_stream.errors import ConfigError


def best_candidates(scores_QN: Tensor, top_k: int) -> Tensor:
    """Whether a candidate is among the `top_k` of a query, bool (Q, N); of equal scores the first ones.

    Raises:
        ConfigError: there are fewer candidates.
    """
    if top_k > scores_QN.shape[1]:
        raise ConfigError(
            f"top_k={top_k} is more than the {scores_QN.shape[1]} there are to choose from: set top_k to that or less, "
            "or mode=exact, which is the same then"
        )
    last_Q1 = scores_QN.topk(top_k, dim=1).values[:, -1:]
    better_QN, equal_QN = scores_QN > last_Q1, scores_QN == last_Q1
    return better_QN | (equal_QN & (equal_QN.cumsum(dim=1) <= top_k - better_QN.sum(dim=1, keepdim=True)))


def reranked(first_QN: Tensor, second_QN: Tensor, best_QN: Tensor) -> Tensor:
    """Scores that put the best candidates in front, in their new order, and leave the others behind in their old one.

    Args:
        first_QN: by which the best were chosen.
        second_QN: of the best, 0 or more.
        best_QN: from `best_candidates`.

    Returns:
        `second_QN` where it counts; below 0 elsewhere, `first_QN` moved down.
    """
    behind_QN = first_QN.double() - first_QN.max() - 1
    return torch.where(best_QN, second_QN, behind_QN)
