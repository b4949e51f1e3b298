"""Several clips of a video make one score, as in ClipBERT (Lei et al., CVPR 2021, section 3). Legend: K clips."""

from typing import Literal

from torch import Tensor

Aggregation = Literal["mean", "max", "lse"]


def aggregate(logits_K: Tensor, how: Aggregation) -> Tensor:
    """One value for the clips of a video, over the last dimension: mean, largest, or log-sum-exp.

    Args:
        logits_K: (..., K), what a softmax or a sigmoid has not seen yet.
        how: of one clip, all three are the value itself.
    """
    if how == "mean":
        return logits_K.mean(dim=-1)
    return logits_K.amax(dim=-1) if how == "max" else logits_K.logsumexp(dim=-1)
