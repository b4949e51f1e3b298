"""The whole model (paper, figure 2) and its dual encoder, which alone is also the prompter.

Legend: B samples, T frames, C colours, H W pixels, L tokens, N video tokens, D width, E projection, M entities,
A answers, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.bert.modeling_bert import BertEmbeddings

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.model.precision import at_least_float32, initialise_weights
from alpro_stream.model.text_encoder import MlmHead, MultimodalEncoder, TextEncoder, TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder, VideoEncoderConfig

TEMPERATURE_RANGE = (0.001, 0.5)

Task = Literal["prompter", "pretrain", "retrieval", "question_answering"]
"""What a model is for: each has the heads that its losses need, and no others."""


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

    def video_feature(self, video_BTCHW: Tensor) -> Tensor:
        """The feature_BE of `encode_video` without the tokens, a little cheaper."""
        return unit_feature(self.video_projection, self.video_encoder.forward_cls(video_BTCHW))

    def temperature(self) -> Tensor:
        """The temperature, a float32 scalar clamped to [0.001, 0.5].

        The gradient passes the clamp, or a temperature that has left the range could never come back.
        """
        raw = at_least_float32(self.raw_temperature)[0]
        return raw.detach().clamp(*TEMPERATURE_RANGE) + (raw - raw.detach())


@dataclass(frozen=True)
class Heads:
    """Which heads sit on the multimodal encoder; 0 entities or answers mean no head for them."""

    vtm: bool = False
    mlm: bool = False
    num_entities: int = 0
    num_answers: int = 0

    @classmethod
    def of(cls, task: Task, num_entities: int = 0, num_answers: int = 0) -> "Heads":
        """The heads of a task; pre-training without PEM has no entities.

        Raises:
            ConfigError: question answering without answers; or a prompter, which has no heads.
        """
        if task == "pretrain":
            return cls(vtm=True, mlm=True, num_entities=num_entities)
        if task == "retrieval":
            return cls(vtm=True)
        if task == "question_answering":
            if not num_answers:
                raise ConfigError("a question answering model chooses from a list of answers, which is empty")
            return cls(num_answers=num_answers)
        raise ConfigError(f"a {task} is a dual encoder, it has no multimodal encoder and so no heads")


class AlproModel(nn.Module):
    """Dual encoder, multimodal encoder and the heads of VTM, MLM, PEM and question answering that it was given."""

    def __init__(self, config: ModelConfig, vocab_size: int, heads: Heads) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        width = config.text.width
        self.dual = DualEncoder(config, vocab_size)
        self.multimodal = MultimodalEncoder(config.text, vocab_size)
        self.vtm_head = nn.Linear(width, 2) if heads.vtm else None
        embeddings = cast(BertEmbeddings, self.dual.text_encoder.embeddings)
        self.mlm_head = MlmHead(width, embeddings.word_embeddings) if heads.mlm else None
        self.pem_head = _two_layers(width, heads.num_entities) if heads.num_entities else None
        self.answer_head = _two_layers(width, heads.num_answers) if heads.num_answers else None
        for head in (self.vtm_head, self.pem_head, self.answer_head):
            if head is not None:
                head.apply(initialise_weights)

    def match_logits(self, cls_BD: Tensor) -> Tensor:
        """VTM, (B, 2), from the multimodal CLS; column 1 means that text and video match."""
        return _run(self.vtm_head, cls_BD, "matching", "pretrain or retrieval")

    def word_logits(self, text_BLD: Tensor) -> Tensor:
        """MLM, logits_BLV, from the multimodal text tokens."""
        return _run(self.mlm_head, text_BLD, "masked-word", "pretrain")

    def entity_logits(self, region_BD: Tensor) -> Tensor:
        """PEM, logits_BM, from the pooled region of the multimodal patch tokens."""
        return _run(self.pem_head, region_BD, "entity", "pretrain")

    def answer_logits(self, cls_BD: Tensor) -> Tensor:
        """Question answering, logits_BA, from the multimodal CLS of video and question."""
        return _run(self.answer_head, cls_BD, "answer", "question_answering")


def build_model(
    task: Task, config: ModelConfig, vocab_size: int, num_entities: int = 0, num_answers: int = 0
) -> AlproModel | DualEncoder:
    """A fresh model of a task.

    Raises:
        ConfigError: question answering without answers.
    """
    if task == "prompter":
        return DualEncoder(config, vocab_size)
    return AlproModel(config, vocab_size, Heads.of(task, num_entities, num_answers))


def _two_layers(width: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, num_outputs))


def _run(head: nn.Module | None, hidden: Tensor, name: str, tasks: str) -> Tensor:
    if head is None:
        raise ConfigError(f"this model has no {name} head; use one that was trained for {tasks}")
    logits: Tensor = head(hidden)
    return logits


def unit_feature(projection: nn.Linear, cls_BD: Tensor) -> Tensor:
    """Projects and normalises outside autocast: VTC divides by a small temperature, which magnifies rounding."""
    with torch.autocast(cls_BD.device.type, enabled=False):
        return normalize(at_least_float32(projection(cls_BD.to(projection.weight.dtype))), dim=-1)
