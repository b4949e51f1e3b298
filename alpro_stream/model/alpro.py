"""The whole model (paper, figure 2) and its dual encoder, which alone is also the prompter.

Legend: B samples, T frames, C colours, H W pixels, L tokens, N video tokens, D width, E projection.
"""

from typing import cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.bert.modeling_bert import BertEmbeddings

from alpro_stream.config import Config
from alpro_stream.model.precision import at_least_float32, initialise_weights
from alpro_stream.model.text_encoder import MlmHead, MultimodalEncoder, TextEncoder, TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder, VideoEncoderConfig

TEMPERATURE_RANGE = (0.001, 0.5)


class ModelConfig(Config):
    """Sizes of the model; the defaults are the published ones."""

    video: VideoEncoderConfig = VideoEncoderConfig()
    """The video encoder."""
    text: TextEncoderConfig = TextEncoderConfig()
    """The text encoder and the multimodal encoder."""
    projection_size: int = Field(default=256, gt=0)
    """Length of the features that VTC, retrieval and the prompter compare."""
    temperature: float = Field(default=0.07, ge=TEMPERATURE_RANGE[0], le=TEMPERATURE_RANGE[1])
    """First value of the learned temperature that divides similarities."""

    @model_validator(mode="after")
    def _check_widths(self) -> "ModelConfig":
        if self.video.width != self.text.width:
            raise ValueError(
                f"video.width {self.video.width} and text.width {self.text.width} differ; the multimodal encoder "
                "reads both kinds of tokens, make them equal"
            )
        return self


class DualEncoder(nn.Module):
    """Video encoder and text encoder with their projections: what VTC trains, and what the prompter is."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.video_encoder = VideoEncoder(config.video)
        self.text_encoder = TextEncoder(config.text, vocab_size)
        self.video_projection = nn.Linear(config.video.width, config.projection_size)
        self.text_projection = nn.Linear(config.text.width, config.projection_size)
        # One element and not a scalar: DeepSpeed cannot broadcast tensors without a dimension.
        self.raw_temperature = nn.Parameter(torch.tensor([config.temperature]))
        self.video_projection.apply(initialise_weights)
        self.text_projection.apply(initialise_weights)

    def encode_video(self, video_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes normalised clips: (tokens_BND, feature_BE), the feature of unit length and in float32."""
        tokens_BND = self.video_encoder(video_BTCHW)
        return tokens_BND, unit_feature(self.video_projection, tokens_BND[:, 0])

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes token ids: (text_BLD, feature_BE), the feature of unit length and in float32."""
        text_BLD = self.text_encoder(ids_BL, mask_BL)
        return text_BLD, unit_feature(self.text_projection, text_BLD[:, 0])

    def temperature(self) -> Tensor:
        """The temperature, a float32 scalar clamped to [0.001, 0.5].

        The gradient passes the clamp, or a temperature that has left the range could never come back.
        """
        raw = at_least_float32(self.raw_temperature)[0]
        return raw.detach().clamp(*TEMPERATURE_RANGE) + (raw - raw.detach())


class Alpro(nn.Module):
    """Dual encoder, multimodal encoder and the heads of VTM, MLM and PEM."""

    def __init__(self, config: ModelConfig, vocab_size: int, num_entities: int) -> None:
        super().__init__()
        self.config = config
        self.num_entities = num_entities
        width = config.text.width
        self.dual = DualEncoder(config, vocab_size)
        self.multimodal = MultimodalEncoder(config.text, vocab_size)
        self.vtm_head = nn.Linear(width, 2)
        """From the multimodal CLS; column 1 means that text and video match."""
        embeddings = cast(BertEmbeddings, self.dual.text_encoder.embeddings)
        self.mlm_head = MlmHead(width, embeddings.word_embeddings)
        """From the multimodal text tokens; tied to the word embeddings."""
        self.pem_head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, num_entities))
        """From the pooled region of the multimodal patch tokens, one logit an entity."""
        self.vtm_head.apply(initialise_weights)
        self.pem_head.apply(initialise_weights)


def unit_feature(projection: nn.Linear, cls_BD: Tensor) -> Tensor:
    """Projects and normalises outside autocast: VTC divides by a small temperature, which magnifies rounding."""
    with torch.autocast(cls_BD.device.type, enabled=False):
        return normalize(at_least_float32(projection(cls_BD.to(projection.weight.dtype))), dim=-1)
