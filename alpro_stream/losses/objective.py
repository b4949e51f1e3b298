"""What a step minimises: the four losses over one micro-batch, exact over the whole global batch.

Legend: B samples of the micro-batch, G of the global batch, L tokens (L lanes before N), N samples of a lane,
P patches, D width, E projection, M entities, S = L + 1 + P, R pairs, Q tokens asked for.

The loss of a run must not depend on how its global batch is cut into ranks and micro-batches. Each loss is
therefore a sum over this micro-batch divided by a count of the *global* batch (`GlobalCounts`), and VTC is
computed over all G features, of which this micro-batch's carry a graph (`GlobalFeatures`). The engine averages
gradients over `shares` = ranks x micro-batches, so everything is multiplied by `shares`; the temperature,
whose gradient every micro-batch computes in full, is divided by it.

A sample that is not valid (`Batch.valid_B`) goes through the model, as shapes must not depend on the data, but no loss
and no count sees it: the result is that of a batch without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from alpro_stream.config import Config
from alpro_stream.losses.mlm import IGNORED_LABEL, mlm_loss
from alpro_stream.losses.pem import PemConfig, box_to_mask, pem_loss, pool_region
from alpro_stream.losses.vtc import vtc_loss
from alpro_stream.losses.vtm import sample_negatives, vtm_loss
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.model.pixels import normalise
from alpro_stream.model.text_encoder import Fusing
from alpro_stream.stream.batch import Batch


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
    valid_G: Tensor
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
    """Weighted sum to differentiate, and every loss by name (shares of the global value, without a graph).

    A name with a slash is that of another figure than a loss.
    """

    total: Tensor
    values: dict[str, Tensor]


Gather = Callable[[Tensor, Tensor], GlobalFeatures]
"""Given this micro-batch's (video_BE, text_BE) without a graph, the features of the global batch."""


class DualObjective(nn.Module):
    """VTC alone: stage one, the prompter."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def compile_parts(self) -> None:
        """Compiles the encoders; a graph break is an error."""
        self._encode = torch.compile(self._encode, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def forward(self, batch: Batch, gather: Gather | None, shares: int) -> Terms | tuple[Tensor, Tensor]:
        """The terms of a micro-batch; its features alone when `gather` is None."""
        video_BE, text_BE = self._encode(batch.frames_BTHWC, batch.ids_BL, batch.mask_BL)
        if gather is None:
            return video_BE, text_BE
        loss = global_vtc(video_BE, text_BE, gather(video_BE.detach(), text_BE.detach()), self.model, shares)
        return Terms(loss * shares, {"vtc": loss.detach() / shares})

    def _encode(self, frames_BTHWC: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(video_BE, text_BE), of unit length."""
        video_BE = self.model.video_feature(normalise(frames_BTHWC))
        _, text_BE = self.model.encode_text(ids_BL, mask_BL)
        return video_BE, text_BE


class PretrainObjective(nn.Module):
    """VTC, VTM, MLM and PEM (paper, section 3).

    Two pure functions of tensors, `_encode` and `_fused_losses`, can each be compiled whole. Between them the ranks
    exchange features for VTC.
    """

    def __init__(self, model: AlproModel, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self._weights = {"vtc": config.vtc, "vtm": config.vtm, "mlm": config.mlm, "pem": config.pem.weight}
        self._pool, self._region = config.pem.pool, config.pem.region

    def compile_parts(self) -> None:
        """Compiles both functions; a graph break is an error."""
        self._encode = torch.compile(self._encode, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        self._fused_losses = torch.compile(  # type: ignore[method-assign]
            self._fused_losses, fullgraph=True, dynamic=False
        )

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
        encoded = self._encode(batch.frames_BTHWC, batch.ids_BL, batch.mask_BL, batch.mlm_ids_BL)
        if gather is None:
            return encoded.video_BE, encoded.text_BE
        assert counts is not None
        values: dict[str, Tensor] = {}
        if self._weights["vtc"]:
            others = gather(encoded.video_BE.detach(), encoded.text_BE.detach())
            values["vtc"] = global_vtc(encoded.video_BE, encoded.text_BE, others, self.model.dual, shares)
        if any(self._weights[name] for name in ("vtm", "mlm", "pem")):
            values |= self._fused_losses(encoded, _Targets.of(batch), counts, soft_labels)
        total = torch.stack([self._weights[name] * value for name, value in values.items()]).sum() * shares
        # VTC's value is already the global one on every share; the others are this share's part of it.
        return Terms(total, {n: v.detach() / (shares if n == "vtc" else 1) for n, v in values.items()})

    def _encode(self, frames_BTHWC: Tensor, ids_BL: Tensor, mask_BL: Tensor, mlm_ids_BL: Tensor) -> "_Encoded":
        size = len(ids_BL)
        video_BND, video_BE = self.model.dual.encode_video(normalise(frames_BTHWC))
        if not self._weights["mlm"]:
            text_BLD, text_BE = self.model.dual.encode_text(ids_BL, mask_BL)
            return _Encoded(video_BND, video_BE, text_BLD, text_BE, None)
        # One pass for clean and masked text.
        ids, mask = torch.cat([ids_BL, mlm_ids_BL]), mask_BL.repeat(2, 1)
        text, features = self.model.dual.encode_text(ids, mask)
        return _Encoded(video_BND, video_BE, text[:size], features[:size], text[size:])

    def _fused_losses(
        self, encoded: "_Encoded", targets: "_Targets", counts: GlobalCounts, soft_labels: SoftLabels | None
    ) -> dict[str, Tensor]:
        """Those of VTM, MLM and PEM that have a weight: this micro-batch's shares of the global values."""
        values: dict[str, Tensor] = {}
        size = len(encoded.video_BND)
        fusing, has_negative_B = self._begin_fusion(encoded, targets)
        if self._weights["vtm"] or self._weights["pem"]:
            # PEM reads the patches of the positives; of everything else in VTM only CLS is read.
            positive_BQD = self.model.multimodal.finish(fusing[:size], None if self._weights["pem"] else 1)
        if self._weights["vtm"]:
            negative_RD = self.model.multimodal.finish(fusing[size : 3 * size], 1)[:, 0]
            logits_R2 = self.model.match_logits(torch.cat([positive_BQD[:, 0], negative_RD]))
            labels_R = torch.arange(3 * size, device=logits_R2.device).lt(size).long()
            weights_R = torch.cat([targets.valid_B, has_negative_B, has_negative_B]).to(logits_R2.dtype)
            values["vtm"] = vtm_loss(logits_R2, labels_R, weights_R, counts.num_pairs)
        length = encoded.text_BLD.shape[1]
        if self._weights["mlm"]:
            logits_BLV = self.model.word_logits(self.model.multimodal.finish(fusing[-size:], length))
            values["mlm"] = mlm_loss(logits_BLV, targets.mlm_labels_BL, counts.num_masked)
        if self._weights["pem"]:
            assert soft_labels is not None
            patches_BPD = positive_BQD[:, length + 1 :]
            inside_BP = box_to_mask(targets.boxes_B4, int(patches_BPD.shape[1] ** 0.5))
            logits_BM = self.model.entity_logits(pool_region(patches_BPD, inside_BP, self._pool, self._region))
            keep_B = soft_labels.keep_B & targets.valid_B
            values["pem"] = pem_loss(logits_BM, soft_labels.labels_BM, keep_B, counts.num_kept)
        return values

    def _begin_fusion(self, encoded: "_Encoded", targets: "_Targets") -> tuple[Fusing, Tensor]:
        """One multimodal pass over positives, hard negatives of both kinds and masked text, in this order.

        Also returns which samples have a negative.
        """
        video_BND, text_BLD, mask_BL = encoded.video_BND, encoded.text_BLD, targets.mask_BL
        has_negative_B = torch.zeros_like(targets.valid_B)
        texts, masks, videos = [], [], []
        if self._weights["vtm"] or self._weights["pem"]:
            texts, masks, videos = [text_BLD], [mask_BL], [video_BND]
        if self._weights["vtm"]:
            video_index_B, text_index_B, has_negative_B = self._negatives(encoded, targets)
            texts += [text_BLD, text_BLD[text_index_B]]
            masks += [mask_BL, mask_BL[text_index_B]]
            videos += [video_BND[video_index_B], video_BND]
        if encoded.masked_BLD is not None:
            texts.append(encoded.masked_BLD)
            masks.append(mask_BL)
            videos.append(video_BND)
        return self.model.multimodal.begin(torch.cat(texts), torch.cat(masks), torch.cat(videos)), has_negative_B

    @torch.no_grad()
    def _negatives(self, encoded: "_Encoded", targets: "_Targets") -> tuple[Tensor, Tensor, Tensor]:
        """Hard negative video of each text, hard negative text of each video, and which samples have any.

        Without VTC they are any other sample, all as likely.
        """
        allowed_LNN = targets.allowed_LNN
        lanes, size = allowed_LNN.shape[:2]
        video_LNE, text_LNE = (f.view(lanes, size, -1) for f in (encoded.video_BE, encoded.text_BE))
        # In float32: similarity over the temperature is an exponent, which magnifies bfloat16's rounding.
        with torch.autocast(video_LNE.device.type, enabled=False):
            similarity_LNN = video_LNE @ text_LNE.mT / self.model.dual.temperature()
        if not self._weights["vtc"]:
            # Nothing trains these features: what they find similar says nothing, and all candidates are as likely.
            similarity_LNN = torch.zeros_like(similarity_LNN)
        noise_2LNN = targets.noise_B2N.view(lanes, size, 2, size).permute(2, 0, 1, 3).to(similarity_LNN)
        video_index_LN, has_negative_LN = sample_negatives(similarity_LNN.mT, allowed_LNN, noise_2LNN[0])
        text_index_LN, _ = sample_negatives(similarity_LNN, allowed_LNN, noise_2LNN[1])
        first_L1 = torch.arange(lanes, device=allowed_LNN.device)[:, None] * size
        return (video_index_LN + first_L1).flatten(), (text_index_LN + first_L1).flatten(), has_negative_LN.flatten()


class _Encoded(NamedTuple):
    """What the dual encoder gives for a micro-batch; the last is None without MLM."""

    video_BND: Tensor
    video_BE: Tensor
    text_BLD: Tensor
    text_BE: Tensor
    masked_BLD: Tensor | None


class _Targets(NamedTuple):
    """The tensors of a batch that the losses read: a compiled function must not see its step or its keys."""

    mask_BL: Tensor
    mlm_labels_BL: Tensor
    boxes_B4: Tensor
    allowed_LNN: Tensor
    noise_B2N: Tensor
    valid_B: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "_Targets":
        return cls(
            batch.mask_BL,
            valid_mlm_labels(batch),
            batch.boxes_B4,
            allowed_negatives(batch),
            batch.noise_B2N,
            batch.valid_B,
        )


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
        others.valid_G,
    )


def count_local(batch: Batch, soft_labels: SoftLabels | None) -> Tensor:
    """(masked tokens, VTM pairs, samples PEM keeps) of a rank's batch, valid ones only; summed over the ranks."""
    num_masked = valid_mlm_labels(batch).ge(0).sum()
    num_pairs = batch.valid_B.sum() + 2 * allowed_negatives(batch).any(dim=2).sum()
    num_kept = torch.zeros_like(num_masked) if soft_labels is None else (soft_labels.keep_B & batch.valid_B).sum()
    return torch.stack([num_masked, num_pairs, num_kept]).float()


def valid_mlm_labels(batch: Batch) -> Tensor:
    """The batch's labels for MLM, (B, L); -100 also everywhere in a sample that is not valid."""
    return batch.mlm_labels_BL.where(batch.valid_B[:, None], IGNORED_LABEL)


def same_pairs(video_id_N: Tensor, text_id_N: Tensor) -> Tensor:
    """Pairs that must not count as negatives: another row of the same video or of the same text, (..., N, N)."""
    same_NN = (video_id_N[..., :, None] == video_id_N[..., None, :]) | (
        text_id_N[..., :, None] == text_id_N[..., None, :]
    )
    return same_NN & ~torch.eye(same_NN.shape[-1], dtype=torch.bool, device=same_NN.device)


def allowed_negatives(batch: Batch) -> Tensor:
    """Who may be whose negative inside each lane, (L, N, N): another sample of another video and another text.

    A sample that is not valid is nobody's negative and has none.
    """
    lanes = batch.num_lanes
    valid_LN = batch.valid_B.view(lanes, -1)
    same_LNN = same_pairs(batch.video_id_B.view(lanes, -1), batch.text_id_B.view(lanes, -1))
    own_NN = torch.eye(same_LNN.shape[-1], dtype=torch.bool, device=same_LNN.device)
    return valid_LN[:, :, None] & valid_LN[:, None, :] & ~(same_LNN | own_NN)


def _place(features_GE: Tensor, own_BE: Tensor, first_row: int) -> Tensor:
    return torch.cat([features_GE[:first_row], own_BE, features_GE[first_row + len(own_BE) :]])
