"""Floating point operations and parameters, from the sizes alone: what MFU and forecasts divide by.

A product of (m, k) and (k, n) matrices is 2 m k n operations; nothing else is counted. The count is that of the method
(paper, figure 2), not of this implementation, which saves some of it: every layer is computed for all its tokens, and
nothing twice. Chowdhery et al. 2022, appendix B, call its ratio to the peak of the hardware MFU.

Legend: T frames, P patches of a frame, D width, F width of an MLP, L text tokens, S = L + 1 + P.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn

from alpro_stream.model.alpro import Heads, ModelConfig, Task

PEAK_PER_S = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""bf16 operations a second of tensor cores without sparsity, by words of the device's name, the more special ones
first: NVIDIA's data sheets."""


def peak_per_s(device_name: str) -> float | None:
    """The peak of a device in bf16, by its name in CUDA; None for one that is not in the table."""
    # Whole words: an L40S is no L4.
    found = (peak for name, peak in PEAK_PER_S.items() if re.search(rf"\b{re.escape(name)}\b", device_name))
    return next(found, None)


@dataclass(frozen=True)
class Operations:
    """Operations of the forward pass of one sample, by part; of these `frozen` in encoders that are not trained."""

    video: float
    text: float
    fusion: float
    heads: float
    prompter: float
    frozen: float = 0.0

    @property
    def forward(self) -> float:
        """Of the trained model, in one step."""
        return self.video + self.text + self.fusion + self.heads

    @property
    def backward(self) -> float:
        """Two products for each one of the forward pass, for the input and for the weights; none of what is frozen."""
        return 2 * (self.forward - self.frozen)

    @property
    def step(self) -> float:
        """Forward, backward and the frozen prompter."""
        return self.forward + self.backward + self.prompter


def step_operations(
    task: Task,
    config: ModelConfig,
    num_tokens: int,
    *,
    vocab_size: int,
    num_entities: int = 0,
    num_answers: int = 0,
    is_image: bool = False,
    frozen: Collection[str] = (),
) -> float:
    """Operations of one sample in a step of a task.

    Args:
        task: what is trained.
        config: sizes.
        num_tokens: L.
        vocab_size: rows of the word embeddings.
        num_entities: M; 0 without PEM.
        num_answers: of question answering.
        is_image: whether the sample is one, which may be encoded once in place of T times.
        frozen: ``video_encoder`` and ``text_encoder``, as far as they are not trained.
    """
    frames = 1 if is_image and config.video.still == "once" else None
    if task == "prompter":
        found = contrastive_operations(config, num_tokens, frames)
    elif task == "retrieval":
        found = retrieval_operations(config, num_tokens, frames)
    elif task == "question_answering":
        found = answering_operations(config, num_tokens, num_answers, frames)
    else:
        found = pretraining_operations(config, num_tokens, vocab_size, Heads.of("pretrain", num_entities), frames)
    encoders = {"video_encoder": found.video, "text_encoder": found.text}
    return replace(found, frozen=sum(encoders[name] for name in frozen)).step


def pretraining_operations(
    config: ModelConfig, num_tokens: int, vocab_size: int, heads: Heads, num_frames: int | None = None
) -> Operations:
    """Operations of one sample in a pre-training step with four losses, whatever their weights; PEM needs entities.

    Clean and masked text are encoded; four pairs are fused: the positive one, two hard negatives, the masked text.

    Args:
        config: sizes.
        num_tokens: L.
        vocab_size: rows of the word embeddings.
        heads: of the model; only the number of entities matters.
        num_frames: T; by default the model's, 1 for images that are encoded once.
    """
    width = config.text.width
    video = video_operations(config, num_frames)
    text, fusion = 2 * _text(config, num_tokens), 4 * _fusion(config, num_tokens)
    projections = 2 * 3 * width * config.projection_size  # Video, clean text, masked text.
    vtm = 2 * 3 * width * 2
    mlm = 2 * num_tokens * (width**2 + width * vocab_size)
    pem = 2 * (2 * width**2 + 2 * width * heads.num_entities) if heads.num_entities else 0
    prompter = video + 2 * config.projection_size * (width + heads.num_entities)
    return Operations(video, text, fusion, projections + vtm + mlm + pem, prompter if heads.num_entities else 0.0)


def retrieval_operations(config: ModelConfig, num_tokens: int, num_frames: int | None = None) -> Operations:
    """Operations of one sample in fine-tuning for retrieval: VTC, and VTM of the positive and two negative pairs."""
    width = config.text.width
    heads = 2 * 2 * width * config.projection_size + 2 * 3 * width * 2
    fusion = 3 * _fusion(config, num_tokens)
    return Operations(video_operations(config, num_frames), _text(config, num_tokens), fusion, float(heads), 0.0)


def answering_operations(
    config: ModelConfig, num_tokens: int, num_answers: int, num_frames: int | None = None
) -> Operations:
    """Operations of one question in fine-tuning for question answering: one pair, and the head of the answers."""
    width = config.text.width
    heads = 2 * (2 * width**2 + 2 * width * num_answers)
    fusion = _fusion(config, num_tokens)
    return Operations(video_operations(config, num_frames), _text(config, num_tokens), fusion, float(heads), 0.0)


def contrastive_operations(config: ModelConfig, num_tokens: int, num_frames: int | None = None) -> Operations:
    """Operations of one sample in a step of the prompter's own training: the dual encoder with VTC."""
    projections = 2 * 2 * config.text.width * config.projection_size
    text = _text(config, num_tokens)
    return Operations(video_operations(config, num_frames), text, 0.0, float(projections), 0.0)


def video_operations(config: ModelConfig, num_frames: int | None = None) -> float:
    """Operations of the video encoder for one clip of T frames.

    ``2 (3 p^2) D T P`` for the patches of side p, and in each block

    - over time, T P tokens: ``2 x 5 D^2`` each (queries, keys, values, two projections) and ``4 T D`` of attention,
    - over space, T (1 + P) tokens: ``2 x 4 D^2`` each and ``4 (1 + P) D``,
    - the MLP, 1 + T P tokens: ``4 D F`` each.
    """
    video = config.video
    frames = num_frames or video.num_frames
    width, hidden, patches = video.width, int(video.width * video.mlp_ratio), video.grid**2
    over_time = frames * patches * (10 * width**2 + 4 * frames * width)
    over_space = frames * (1 + patches) * (8 * width**2 + 4 * (1 + patches) * width)
    mlp = (1 + frames * patches) * 4 * width * hidden
    embedding = 2 * 3 * video.patch_size**2 * width * frames * patches
    return float(embedding + video.depth * (over_time + over_space + mlp))


def _text(config: ModelConfig, num_tokens: int) -> float:
    """The text encoder, of one text."""
    return config.text.num_layers * _layer(num_tokens, config.text.width, config.text.intermediate_size)


def _fusion(config: ModelConfig, num_tokens: int) -> float:
    """The multimodal encoder, of one pair."""
    length = num_tokens + 1 + config.video.grid**2
    return config.text.num_multimodal_layers * _layer(length, config.text.width, config.text.intermediate_size)


def _layer(length: int, width: int, hidden: int) -> float:
    """A BERT layer over `length` tokens: ``8 D^2 + 4 S D + 4 D F`` each."""
    return float(length * (8 * width**2 + 4 * length * width + 4 * width * hidden))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of a model by part, and ``total``; a parameter under two names counts once."""
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    own = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    return {
        **counts,
        **({"own": own} if own else {}),
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }
