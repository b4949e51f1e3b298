"""VTC, video-text contrastive loss (paper, equation 1; ITC in the authors' code).

Legend: G samples of the global batch, E projection.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from alpro_stream.model.precision import at_least_float32


def vtc_loss(video_GE: Tensor, text_GE: Tensor, temperature: Tensor, ignore_GG: Tensor | None = None) -> Tensor:
    """Mean of both directions' cross-entropy, sample i's own partner being the target.

    Args:
        video_GE: unit features of the videos of the global batch.
        text_GE: unit features of the texts, in the same order.
        temperature: divides the similarities.
        ignore_GG: True at [i, j] takes the pair of video i and text j out of both denominators, for a video or
            a text that occurs twice. The diagonal is never taken out.
    """
    targets_G = torch.arange(len(video_GE), device=video_GE.device)
    with torch.autocast(video_GE.device.type, enabled=False):
        logits_GG = at_least_float32(video_GE) @ at_least_float32(text_GE).T / temperature
    if ignore_GG is not None:
        own_GG = targets_G[:, None] == targets_G
        logits_GG = logits_GG.masked_fill(ignore_GG & ~own_GG, -torch.inf)
    return (cross_entropy(logits_GG, targets_G) + cross_entropy(logits_GG.T, targets_G)) / 2
