"""Learning on features that were computed beforehand: neither encoder is run on a video or trained.

Two linear maps are trained with VTC, one on the features of an index of `alpro embed`, one on those of its captions. As
the features are projections of unit length, each map is folded into the projection before it, exactly: the result is a
model folder like any other. Legend: N clips, C captions, B samples of a batch, E projection.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed import embed_texts
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.progress import in_parts
from alpro_stream.evaluate.search import model_of_index
from alpro_stream.losses.vtc import vtc_loss
from alpro_stream.model.alpro import TEMPERATURE_RANGE, DualEncoder
from alpro_stream.model.folder import LoadedModel, ModelDescription, write_model
from alpro_stream.train.restore import load_trained

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 64


class OfflineConfig(Config):
    """Linear maps on the features of an index."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    checkpoint: Path
    """Run, checkpoint or exported model that the index is of."""
    index: Path
    """Folder of `alpro embed`: the clips to learn from, with their captions."""
    out: Path
    """New folder of the model."""
    num_steps: int = Field(default=1000, ge=1)
    """Updates."""
    batch_size: int = Field(default=256, ge=2)
    """Clips of a step, each with one of its captions; all, where there are fewer."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam."""
    seed: int = 0
    """Of the order of clips and captions."""


def learn_offline(config: OfflineConfig) -> list[float]:
    """Trains the maps and writes the model; returns the loss of each step.

    Raises:
        ConfigError: `out` is there already, or there are not two clips with captions.
        AlproError: index or model cannot be read, or are not of each other; see `alpro_stream.errors`.
    """
    if config.out.exists():
        raise ConfigError(f"{config.out} exists; remove it, or set another out")
    index = Index(config.index)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(model_of_index(index, config.checkpoint), device)
    pairs = [(number, row.captions) for number, row in enumerate(index.rows()) if row.captions]
    if len(pairs) < 2:
        raise ConfigError(f"{config.index} has {len(pairs)} clips with a caption; at least 2 are needed to tell apart")
    captions = sorted({caption for _, texts in pairs for caption in texts})
    number_of = {caption: number for number, caption in enumerate(captions)}
    text_CE = _text_features(trained, captions)
    video_NE = torch.cat(index.features)[[number for number, _ in pairs]].float().to(device)
    own_captions = [[number_of[caption] for caption in texts] for _, texts in pairs]
    logger.info("%d clips and %d captions, from %s", len(pairs), len(captions), config.index)
    maps = _Maps(trained.dual).to(device)
    losses = _train(maps, video_NE, text_CE, own_captions, config)
    known = trained.description
    description = ModelDescription(
        task="prompter", model=known.model, vocab_size=known.vocab_size, num_tokens=known.num_tokens
    )
    write_model(config.out, description, maps.folded_into(trained.dual), trained.tokenizer)
    return losses


def _text_features(model: LoadedModel, captions: Sequence[str]) -> Tensor:
    """Some at a time, because their tokens take much more room than their features."""
    parts = in_parts(captions, _TEXTS_AT_ONCE, "captions")
    return torch.cat([embed_texts(model.dual, part, model.tokenizer, len(part)).feature_CE for part in parts])


class _Maps(nn.Module):
    """A linear map for each kind of feature, which changes nothing at first, and the temperature."""

    def __init__(self, dual: DualEncoder) -> None:
        super().__init__()
        size = dual.config.projection_size
        self.video_EE = nn.Parameter(torch.eye(size))
        self.text_EE = nn.Parameter(torch.eye(size))
        self.raw_temperature = nn.Parameter(dual.temperature().detach()[None])

    def folded_into(self, dual: DualEncoder) -> dict[str, Tensor]:
        """The weights of the dual encoder with these maps after its projections."""
        weights = {name: weight.cpu() for name, weight in dual.state_dict().items()}
        for kind, map_EE in (("video", self.video_EE), ("text", self.text_EE)):
            for part in ("weight", "bias"):
                name = f"{kind}_projection.{part}"
                weights[name] = map_EE.detach().cpu() @ weights[name]
        return {**weights, "raw_temperature": self.raw_temperature.detach().cpu()}


def _train(
    maps: _Maps, video_NE: Tensor, text_CE: Tensor, own_captions: Sequence[Sequence[int]], config: OfflineConfig
) -> list[float]:
    optimizer = torch.optim.Adam(maps.parameters(), config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    for _ in range(config.num_steps):
        clips_B = torch.randperm(len(video_NE), generator=generator)[: config.batch_size]
        draws_B = torch.rand(len(clips_B), generator=generator).tolist()
        captions = [own_captions[clip] for clip in clips_B.tolist()]
        texts_B = torch.tensor([own[int(draw * len(own))] for own, draw in zip(captions, draws_B, strict=True)])
        loss = vtc_loss(
            normalize(video_NE[clips_B] @ maps.video_EE.T, dim=-1),
            normalize(text_CE[texts_B] @ maps.text_EE.T, dim=-1),
            maps.raw_temperature[0],
            # A caption that two clips share is no negative of either.
            ignore_GG=(texts_B[:, None] == texts_B).to(video_NE.device),
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        maps.raw_temperature.data.clamp_(*TEMPERATURE_RANGE)
        losses.append(loss.item())
    return losses
