"""What a step minimises: the four losses over one micro-batch, exact over the whole global batch.

Legend: B samples of the micro-batch, G of the global batch, L tokens, P patches, D width, E projection,
M entities, S = L + 1 + P.

The loss of a run must not depend on how its global batch is cut into ranks and micro-batches. Each loss is
therefore a sum over this micro-batch divided by a count of the *global* batch (`GlobalCounts`), and VTC is
computed over all G features, of which this micro-batch's carry a graph (`GlobalFeatures`). The engine averages
gradients over `shares` = ranks x micro-batches, so everything is multiplied by `shares`; the temperature,
whose gradient every micro-batch computes in full, is divided by it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alpro_stream.config import Config
from alpro_stream.losses.mlm import mlm_loss
from alpro_stream.losses.pem import PemConfig, box_to_mask, pem_loss, pool_region
from alpro_stream.losses.vtc import vtc_loss
from alpro_stream.losses.vtm import sample_negatives, vtm_loss
from alpro_stream.model.alpro import Alpro, DualEncoder
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.seeds import Draws


class ObjectiveConfig(Config):
    """Weights of the losses; a weight of 0 leaves the loss out altogether."""

    vtc: float = Field(default=1.0, ge=0)
    """Video-text contrastive."""
    vtm: float = Field(default=1.0, ge=0)
    """Video-text matching."""
    mlm: float = Field(default=1.0, ge=0)
    """Masked language modelling."""
    pem: PemConfig = PemConfig()
    """Prompting entity modelling."""

    @property
    def multimodal(self) -> bool:
        """Whether any loss needs the multimodal encoder."""
        return bool(self.vtm or self.mlm or self.pem.weight)

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not (self.vtc or self.multimodal):
            raise ValueError("all four losses have weight 0: there is nothing to train")
        return self


@dataclass(frozen=True)
class GlobalFeatures:
    """Features of the whole global batch, without a graph, and where this micro-batch lies in it."""

    video_GE: Tensor
    text_GE: Tensor
    ignore_GG: Tensor
    first_row: int


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators over the global batch; the same on every rank."""

    num_masked: Tensor
    num_pairs: Tensor
    num_kept: Tensor


@dataclass(frozen=True)
class SoftLabels:
    """The prompter's answer for a batch: distribution over entities, and which samples PEM keeps."""

    labels_BM: Tensor
    keep_B: Tensor


@dataclass(frozen=True)
class Terms:
    """Weighted sum to differentiate, and every loss by name (shares of the global value, without a graph)."""

    total: Tensor
    values: dict[str, Tensor]


Gather = Callable[[Tensor, Tensor], GlobalFeatures]
"""Given this micro-batch's (video_BE, text_BE) without a graph, the features of the global batch."""


class DualObjective(nn.Module):
    """VTC alone: stage one, the prompter."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(video_BE, text_BE), normalised."""
        _, video_BE = self.model.encode_video(normalise(batch.frames_BTHWC))
        _, text_BE = self.model.encode_text(batch.ids_BL, batch.mask_BL)
        return video_BE, text_BE

    def forward(self, batch: Batch, gather: Gather | None, shares: int) -> Terms | tuple[Tensor, Tensor]:
        """The terms of a micro-batch; its features alone when `gather` is None."""
        video_BE, text_BE = self.features(batch)
        if gather is None:
            return video_BE, text_BE
        loss = global_vtc(video_BE, text_BE, gather(video_BE.detach(), text_BE.detach()), self.model, shares)
        return Terms(loss * shares, {"vtc": loss.detach() / shares})


class PretrainObjective(nn.Module):
    """VTC, VTM, MLM and PEM (paper, section 3)."""

    def __init__(self, model: Alpro, config: ObjectiveConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self._config = config
        self._weights = {"vtc": config.vtc, "vtm": config.vtm, "mlm": config.mlm, "pem": config.pem.weight}
        self._seed = seed

    def forward(
        self,
        batch: Batch,
        gather: Gather | None,
        shares: int,
        counts: GlobalCounts | None = None,
        soft_labels: SoftLabels | None = None,
    ) -> Terms | tuple[Tensor, Tensor]:
        """The terms of a micro-batch; its features alone when `gather` is None.

        Args:
            batch: the micro-batch, B samples.
            gather: gives the features of the global batch.
            shares: ranks x micro-batches of a step.
            counts: denominators over the global batch.
            soft_labels: the prompter's labels of this micro-batch; needed when PEM has a weight.
        """
        dual = self.model.dual
        video_BND, video_BE = dual.encode_video(normalise(batch.frames_BTHWC))
        ids, mask = batch.ids_BL, batch.mask_BL
        if self._config.mlm:  # One pass for clean and masked text.
            ids, mask = torch.cat([ids, batch.mlm_ids_BL]), mask.repeat(2, 1)
        text, features = dual.encode_text(ids, mask)
        text_BLD, text_BE = text[: len(batch)], features[: len(batch)]
        if gather is None:
            return video_BE, text_BE
        assert counts is not None
        others = gather(video_BE.detach(), text_BE.detach())
        values: dict[str, Tensor] = {}
        if self._config.vtc:
            values["vtc"] = global_vtc(video_BE, text_BE, others, dual, shares)
        if self._config.multimodal:
            fused = self._fuse(batch, video_BND, video_BE, text_BLD, text_BE, text[len(batch) :], counts, values)
            if self._config.pem.weight:
                assert soft_labels is not None
                values["pem"] = self._pem(batch, fused, soft_labels, counts)
        total = torch.stack([self._weights[name] * value for name, value in values.items()]).sum() * shares
        # VTC's value is already the global one on every share; the others are this share's part of it.
        return Terms(total, {n: v.detach() / (shares if n == "vtc" else 1) for n, v in values.items()})

    def _fuse(
        self,
        batch: Batch,
        video_BND: Tensor,
        video_BE: Tensor,
        text_BLD: Tensor,
        text_BE: Tensor,
        masked_BLD: Tensor,
        counts: GlobalCounts,
        values: dict[str, Tensor],
    ) -> Tensor:
        """One multimodal pass over positives, hard negatives and masked text; returns the positives' output."""
        size = len(batch)
        texts, masks, videos = [], [], []
        if self._config.vtm or self._config.pem.weight:
            texts, masks, videos = [text_BLD], [batch.mask_BL], [video_BND]
        if self._config.vtm:
            similarity_BB = self._similarity(video_BE, text_BE)
            video_index_B, text_index_B, valid_B = self._negatives(batch, similarity_BB)
            texts += [text_BLD, text_BLD[text_index_B]]
            masks += [batch.mask_BL, batch.mask_BL[text_index_B]]
            videos += [video_BND[video_index_B], video_BND]
        if self._config.mlm:
            texts.append(masked_BLD)
            masks.append(batch.mask_BL)
            videos.append(video_BND)
        fused_RSD: Tensor = self.model.multimodal(torch.cat(texts), torch.cat(masks), torch.cat(videos))
        if self._config.vtm:
            logits_R2 = self.model.vtm_head(fused_RSD[: 3 * size, 0])
            labels_R = torch.arange(3 * size, device=logits_R2.device).lt(size).long()
            weights_R = torch.cat([torch.ones_like(valid_B), valid_B, valid_B]).to(logits_R2.dtype)
            values["vtm"] = vtm_loss(logits_R2, labels_R, weights_R, counts.num_pairs)
        if self._config.mlm:
            logits_BLV = self.model.mlm_head(fused_RSD[-size:, : batch.ids_BL.shape[1]])
            values["mlm"] = mlm_loss(logits_BLV, batch.mlm_labels_BL, counts.num_masked)
        return fused_RSD[:size]

    @torch.no_grad()
    def _similarity(self, video_BE: Tensor, text_BE: Tensor) -> Tensor:
        """Similarity over the temperature in float32: it is an exponent, which magnifies bfloat16's rounding."""
        with torch.autocast(video_BE.device.type, enabled=False):
            return video_BE @ text_BE.T / self.model.dual.temperature()

    def _negatives(self, batch: Batch, similarity_BB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hard negative video of each text, hard negative text of each video, and which rows have any."""
        allowed_BB = allowed_negatives(batch)
        noise_2BB = negative_noise(self._seed, batch).to(similarity_BB)
        video_index_B, valid_B = sample_negatives(similarity_BB.T, allowed_BB, noise_2BB[0])
        text_index_B, _ = sample_negatives(similarity_BB, allowed_BB, noise_2BB[1])
        return video_index_B, text_index_B, valid_B

    def _pem(self, batch: Batch, fused_BSD: Tensor, soft_labels: SoftLabels, counts: GlobalCounts) -> Tensor:
        config = self._config.pem
        patches_BPD = fused_BSD[:, batch.ids_BL.shape[1] + 1 :]
        inside_BP = box_to_mask(batch.boxes_B4, int(patches_BPD.shape[1] ** 0.5))
        region_BD = pool_region(patches_BPD, inside_BP, config.pool, config.region)
        logits_BM = self.model.pem_head(region_BD)
        return pem_loss(logits_BM, soft_labels.labels_BM, soft_labels.keep_B, counts.num_kept)


def global_vtc(video_BE: Tensor, text_BE: Tensor, others: GlobalFeatures, model: DualEncoder, shares: int) -> Tensor:
    """VTC of the whole global batch in which this micro-batch's features carry a graph.

    Every share computes the same value; the gradient with respect to its own features is complete, as the loss
    contains all rows and columns, so no gradient has to travel between ranks.
    """
    temperature = model.temperature()
    # Every share finds the whole gradient of the temperature: divide it, as the shares are added up.
    temperature = temperature.detach() + (temperature - temperature.detach()) / shares
    return vtc_loss(
        _place(others.video_GE, video_BE, others.first_row),
        _place(others.text_GE, text_BE, others.first_row),
        temperature,
        others.ignore_GG,
    )


def count_local(batch: Batch, soft_labels: SoftLabels | None) -> Tensor:
    """(masked tokens, VTM pairs with a negative, samples PEM keeps) of a rank's batch; summed over the ranks."""
    num_masked = batch.mlm_labels_BL.ge(0).sum()
    num_pairs = len(batch) + 2 * allowed_negatives(batch).any(dim=1).sum()
    num_kept = soft_labels.keep_B.sum() if soft_labels is not None else torch.zeros_like(num_masked)
    return torch.stack([num_masked, num_pairs, num_kept]).float()


def same_pairs(video_id_G: Tensor, text_id_G: Tensor) -> Tensor:
    """Pairs that must not count as negatives: another row of the same video or of the same text."""
    same_GG = (video_id_G[:, None] == video_id_G) | (text_id_G[:, None] == text_id_G)
    return same_GG.fill_diagonal_(False)


def allowed_negatives(batch: Batch) -> Tensor:
    """Who may be whose negative, (B, B): samples of the same lane with another video and another text."""
    lane_B = torch.arange(len(batch), device=batch.ids_BL.device) // (len(batch) // batch.num_lanes)
    same_BB = same_pairs(batch.video_id_B, batch.text_id_B).fill_diagonal_(True)
    return (lane_B[:, None] == lane_B) & ~same_BB


def negative_noise(seed: int, batch: Batch) -> Tensor:
    """Exponential noise of the race for negatives, (2, B, B), drawn per (seed, step, lane); 1 between lanes."""
    size = len(batch) // batch.num_lanes
    noise_2BB = torch.ones(2, len(batch), len(batch), dtype=torch.float64)
    for index in range(batch.num_lanes):
        draws = Draws("negatives", seed, batch.step, batch.first_lane + index).exponential(2, size, size)
        rows = slice(index * size, (index + 1) * size)
        noise_2BB[:, rows, rows] = torch.from_numpy(draws)
    return noise_2BB


def _place(features_GE: Tensor, own_BE: Tensor, first_row: int) -> Tensor:
    return torch.cat([features_GE[:first_row], own_BE, features_GE[first_row + len(own_BE) :]])
