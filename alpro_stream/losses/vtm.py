"""VTM, video-text matching loss with hard negatives (paper, section 3.2; ITM in the authors' code).

Legend: N candidates on both sides, R pairs; any number of dimensions may stand before N.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alpro_stream.model.precision import at_least_float32


def sample_negatives(similarity_NN: Tensor, allowed_NN: Tensor, noise_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one negative a row from softmax(similarity) over the allowed candidates.

    An exponential race: candidate j arrives at time noise_j / p_j, and the first one wins with probability p_j.
    It is one argmax over the batch, so nothing waits for the device.

    Args:
        similarity_NN: similarity of each row to each candidate, already divided by the temperature.
        allowed_NN: True where a candidate may be drawn.
        noise_NN: independent draws from the exponential distribution with rate 1.

    Returns:
        index_N: the candidate of each row, 0 where nothing is allowed.
        valid_N: False where nothing is allowed.
    """
    # The smallest noise / p has the largest log p - log noise; log p is the similarity up to a row's constant.
    race_NN = at_least_float32(similarity_NN) - at_least_float32(noise_NN).log()
    race_NN = race_NN.masked_fill(~allowed_NN, -torch.inf)
    valid_N = allowed_NN.any(dim=-1)
    return race_NN.argmax(dim=-1).where(valid_N, 0), valid_N


def vtm_loss(logits_R2: Tensor, labels_R: Tensor, weights_R: Tensor, total_weight: Tensor | None = None) -> Tensor:
    """Weighted mean of the cross-entropy between match (label 1) and no match (label 0).

    Args:
        logits_R2: the matching head's output; column 1 means match.
        labels_R: 0 or 1.
        weights_R: weight of each pair; 0 leaves the pair out.
        total_weight: the denominator, when it counts more pairs than these; None sums the weights.

    Returns:
        The loss; 0 with zero gradients when all weights are 0.
    """
    losses_R = cross_entropy(at_least_float32(logits_R2), labels_R, reduction="none")
    total = weights_R.sum() if total_weight is None else total_weight
    # Only 0 is replaced: weights may be smaller than 1 and so may their sum.
    return (losses_R * weights_R).sum() / total.where(total > 0, 1)
