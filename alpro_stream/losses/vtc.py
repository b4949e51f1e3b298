"""VTC, video-text contrastive loss (paper, equation 1; ITC in the authors' code).

Legend: G samples of the global batch, E projection.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alpro_stream.model.precision import at_least_float32


def vtc_loss(
    video_GE: Tensor,
    text_GE: Tensor,
    temperature: Tensor,
    ignore_GG: Tensor | None = None,
    valid_G: Tensor | None = None,
) -> Tensor:
    """Mean of both directions' cross-entropy over the valid samples, sample i's own partner being the target.

    Args:
        video_GE: unit features of the videos of the global batch.
        text_GE: unit features of the texts, in the same order.
        temperature: divides the similarities.
        ignore_GG: True at [i, j] takes the pair of video i and text j out of both denominators, for a video or
            a text that occurs twice. The diagonal is never taken out.
        valid_G: False leaves a sample out: out of the mean, and its video and its text out of every denominator.
            None is all of them.

    Returns:
        The loss; 0 with zero gradients when no sample is valid.
    """
    targets_G = torch.arange(len(video_GE), device=video_GE.device)
    with torch.autocast(video_GE.device.type, enabled=False):
        logits_GG = at_least_float32(video_GE) @ at_least_float32(text_GE).T / temperature
    if valid_G is None:
        valid_G = torch.ones_like(targets_G, dtype=torch.bool)
    unseen_GG = ~(valid_G[:, None] & valid_G)
    if ignore_GG is not None:
        unseen_GG = unseen_GG | ignore_GG
    # The diagonal stays in every row: alone in the row of an invalid sample, it makes its loss and its gradient 0
    # exactly, where a row of nothing but -inf would make the gradient NaN.
    own_GG = targets_G[:, None] == targets_G
    logits_GG = logits_GG.masked_fill(unseen_GG & ~own_GG, -torch.inf)
    count = valid_G.sum().clamp(min=1)
    to_text = cross_entropy(logits_GG, targets_G, reduction="sum") / count
    to_video = cross_entropy(logits_GG.T, targets_G, reduction="sum") / count
    return (to_text + to_video) / 2
