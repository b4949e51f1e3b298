"""Soft labels: what the prompter believes a crop shows. Legend: B samples, M entities, E projection, T frames."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from alpro_stream.losses.objective import SoftLabels
from alpro_stream.losses.pem import PemConfig, keep_and_renormalise
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.pixels import crop_outside_black, normalise

Kind = Literal["video", "image"]
Precision = Literal["fp32", "bf16"]


def entity_similarity(feature_BE: Tensor, bank_ME: Tensor, temperature: Tensor) -> Tensor:
    """Similarity of crops and entity prompts over the temperature, (B, M); its softmax is q (paper, eq. 6)."""
    return feature_BE @ bank_ME.T / temperature


class Labeller:
    """The frozen prompter with its prompt banks.

    Args:
        encoder: the dual encoder; it is put into evaluation mode and its gradients are switched off.
        banks: prompt features (M, E) of each kind.
        config: which samples or entities are ignored.
        patch_size: side of a patch, pixels; crop boxes come in patches.
        precision: of the encoder; features, similarities and labels are float32 in any case.
        compile: compiles the encoder, when the first batch of each shape comes.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        banks: Mapping[str, Tensor],
        config: PemConfig,
        patch_size: int,
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> None:
        self._encoder = encoder.eval().requires_grad_(False)
        self.device = next(encoder.parameters()).device
        self._banks = {kind: bank_ME.to(self.device) for kind, bank_ME in banks.items()}
        self._config = config
        self._patch_size = patch_size
        self._precision = precision
        self.num_entities = len(self._banks["video"])
        if compile:
            self._features = torch.compile(  # type: ignore[method-assign]
                self._features, fullgraph=True, dynamic=False
            )

    # Not inference_mode: the labels become part of PEM's graph, which inference tensors may not.
    @torch.no_grad()
    def __call__(self, frames_BTHWC: Tensor, boxes_B4: Tensor, kind: Kind) -> SoftLabels:
        """Labels of the crops of a batch; frames are uint8, boxes in patches."""
        # In float32 nothing is set: whoever calls may have an autocast of its own.
        lower = torch.autocast(self.device.type, torch.bfloat16) if self._precision == "bf16" else nullcontext()
        with lower:
            feature_BE = self._features(frames_BTHWC, boxes_B4)
        # The temperature, which is small, magnifies rounding.
        with torch.autocast(self.device.type, enabled=False):
            similarity_BM = entity_similarity(feature_BE, self._banks[kind], self._encoder.temperature())
            q_BM = similarity_BM.softmax(dim=1)
            labels_BM, keep_B = keep_and_renormalise(q_BM, similarity_BM, self._config.ignore, self._config.threshold)
        return SoftLabels(labels_BM, keep_B)

    def _features(self, frames_BTHWC: Tensor, boxes_B4: Tensor) -> Tensor:
        """Features of the crops, (B, E)."""
        crops = crop_outside_black(frames_BTHWC, boxes_B4, self._patch_size)
        return self._encoder.video_feature(normalise(crops))
