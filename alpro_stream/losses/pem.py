"""PEM, prompting entity modelling loss (paper, section 3.3; MPM in the authors' code).

Legend: B samples, P patches, D width, M entities.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax

from alpro_stream.config import Config
from alpro_stream.model.pixels import inside_box
from alpro_stream.model.precision import at_least_float32

Pool = Literal["mean", "max"]
Region = Literal["crop", "context"]
IgnoreRule = Literal["sample", "entity", "reference"]


class PemConfig(Config):
    """How PEM reads the region and which of the prompter's labels it trusts."""

    pool: Pool = "mean"
    """How the patches of the region become one vector; the paper takes their mean."""
    region: Region = "crop"
    """Which patches: inside the crop the prompter saw, as in the paper, or the context around it."""
    ignore: IgnoreRule = "sample"
    """Low confidence: `sample` ignores a sample whose largest probability is under the threshold (the paper);
    `entity` removes the entities under it and renormalises the rest; `reference` ignores a sample when the
    number of its best entity is under it, as the authors' code does (to reproduce its numbers, not to train).
    """
    threshold: float = Field(default=0.2, ge=0, le=1)
    """Confidence that a label needs."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the loss; 0 leaves it, and the prompter, out."""


def keep_and_renormalise(
    q_BM: Tensor, similarity_BM: Tensor, rule: IgnoreRule, threshold: float
) -> tuple[Tensor, Tensor]:
    """Applies the rule for low confidence (`PemConfig.ignore`).

    Args:
        q_BM: the prompter's distribution over entities.
        similarity_BM: the similarities it comes from; only the rule `reference` reads them.
        rule: which rule.
        threshold: the confidence it asks for.

    Returns:
        labels_BM: what the loss should match.
        keep_B: False for a sample that the loss must ignore.
    """
    if rule == "sample":
        return q_BM, q_BM.amax(dim=1) >= threshold
    if rule == "reference":
        return q_BM, similarity_BM.argmax(dim=1) >= threshold
    trusted_BM = q_BM.where(q_BM >= threshold, 0)
    total_B1 = trusted_BM.sum(dim=1, keepdim=True)
    return trusted_BM / total_B1.where(total_B1 > 0, 1), total_B1[:, 0] > 0


def box_to_mask(boxes_B4: Tensor, grid: int) -> Tensor:
    """True for the patches inside each box (top, left, height, width in patches), row by row: inside_BP."""
    return inside_box(boxes_B4, grid, grid).flatten(1)


def pool_region(patches_BPD: Tensor, inside_BP: Tensor, pool: Pool, region: Region) -> Tensor:
    """One vector a sample from the patches inside the crop, or outside it; zeros where there are none."""
    chosen_BP1 = (inside_BP if region == "crop" else ~inside_BP)[:, :, None]
    patches_BPD = at_least_float32(patches_BPD)
    count_B1 = chosen_BP1.sum(dim=1)
    if pool == "mean":
        return patches_BPD.where(chosen_BP1, 0).sum(dim=1) / count_B1.clamp(min=1)
    largest_BD = patches_BPD.masked_fill(~chosen_BP1, -torch.inf).amax(dim=1)
    return largest_BD.where(count_B1 > 0, 0)


def pem_loss(logits_BM: Tensor, labels_BM: Tensor, keep_B: Tensor, num_kept: Tensor | None = None) -> Tensor:
    """Mean cross-entropy between soft labels and predictions, over the kept samples.

    Args:
        logits_BM: the PEM head's output.
        labels_BM: distribution over entities.
        keep_B: False leaves a sample out.
        num_kept: the denominator, when it counts more samples than these; None counts `keep_B`.

    Returns:
        The loss; 0 with zero gradients when no sample is kept.
    """
    losses_B = -(labels_BM * log_softmax(at_least_float32(logits_BM), dim=1)).sum(dim=1)
    count = keep_B.sum() if num_kept is None else num_kept
    return losses_B.where(keep_B, 0).sum() / count.clamp(min=1)
