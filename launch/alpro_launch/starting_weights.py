"""Starting weights at the size of an ablation, in place of a ViT trained on ImageNet and of BERT.

The same division of labour as the published start: the video encoder has named single objects in still pictures and
knows no time; the text encoder and the multimodal encoder above it have filled in masked words of captions, and have
seen no picture. Objects and captions are those of a generated corpus (`alpro_stream.testing.glyphs`).

Legend: B samples, L tokens, D width, P classes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alpro_stream.config import Config, differences
from alpro_stream.errors import ConfigError
from alpro_stream.losses.mlm import mlm_loss
from alpro_stream.model.alpro import AlproModel, ModelConfig, build_model
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.seeds import sample_keys
from alpro_stream.stream.text import TextConfig, Tokenizer
from alpro_stream.testing.glyphs.corpus import MANIFEST_FILE, CorpusConfig, read_corpus_config, split_of
from alpro_stream.testing.glyphs.render import draw_picture
from alpro_stream.testing.glyphs.scene import GRID, Thing
from alpro_stream.testing.glyphs.vocabulary import COLOURS, NOUNS, TILE_SIDE

_SETTINGS_FILE = "starting_weights.json"
_PUBLISHED_STD = 0.02
_LAST = 50
"""Steps at the end whose figures are told."""


class StepsConfig(Config):
    """One of the two stages."""

    max_steps: int = Field(ge=1)
    """Steps, with AdamW and a cosine schedule after a short warm-up."""
    batch_size: int = Field(ge=2)
    """Pictures or captions of a step."""
    learning_rate: float = Field(gt=0)
    """Peak of the schedule."""


class StartingWeightsConfig(Config):
    """What the starting weights are trained on, and how long."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    seed: int = Field(default=0, ge=0)
    """Of the fresh weights and of every draw."""
    corpus: Path
    """Folder of a generated corpus: the captions of its training split."""
    out: Path
    """Gets a model folder, for `start_from`."""
    model: ModelConfig
    """Sizes; four cells must fill a frame."""
    text: TextConfig
    """Captions to tokens."""
    classes: Literal["all", "others"] = "all"
    """Objects of the pictures: all that have a glyph, or those alone that the corpus does not show. Of the corpus's
    objects only the colours that its training clips show them in."""
    position_std: float = Field(default=_PUBLISHED_STD, ge=0)
    """Deviation of fresh embeddings of a patch's place, before the pictures; published: 0.02. At small widths more is
    needed where captions say where something is."""
    time_std: float = Field(default=0.0, ge=0)
    """Deviation of the embeddings of a frame's time, which pictures do not teach. 0 as published: frames begin
    without an order, and then which way an object goes is found late, or never."""
    pictures: StepsConfig = StepsConfig(max_steps=1200, batch_size=64, learning_rate=2e-3)
    """Of the video encoder: which object, which colour."""
    captions: StepsConfig = StepsConfig(max_steps=400, batch_size=64, learning_rate=2e-3)
    """Of the text encoder and the multimodal encoder: masked words."""

    @model_validator(mode="after")
    def _dots_are_whole(self) -> Self:
        if (size := self.model.video.image_size) % (GRID * TILE_SIDE):
            raise ValueError(f"model.video.image_size {size} is no multiple of {GRID * TILE_SIDE}, dots of a frame")
        return self


def train_starting_weights(config: StartingWeightsConfig, tell: Callable[[str], None] = print) -> None:
    """Trains and writes a model folder of task `pretrain`; one that is there is left as it is.

    Args:
        config: of both stages.
        tell: gets a line of text after each.

    Raises:
        ConfigError: other ones are there; or the corpus shows all objects that have a glyph, and others are wanted.
    """
    if _is_there(config):
        tell(f"there already: {config.out}")
        return
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.text.tokenizer, config.text.num_tokens)
    model = build_model("pretrain", config.model, tokenizer.vocab_size)
    assert isinstance(model, AlproModel)
    model.apply(_start_wide)
    encoder = model.dual.video_encoder
    with torch.no_grad():
        encoder.pos_embed.mul_(config.position_std / _PUBLISHED_STD)
    # Again, after that: what the encoder learns in pictures is then what it knows of a clip's frames.
    encoder.start_time_as_identity()
    accuracy = _train_pictures(model, config)
    if config.time_std:
        nn.init.normal_(encoder.time_embed, std=config.time_std)
    tell(f"objects in still pictures: {100 * accuracy:.0f} % named in the last {_LAST} steps")
    loss = _train_captions(model, tokenizer, config)
    tell(f"masked words of captions without pictures: loss {loss:.2f} in the last {_LAST} steps")
    description = ModelDescription(
        task="pretrain", model=config.model, vocab_size=tokenizer.vocab_size, num_tokens=config.text.num_tokens
    )
    write_model(config.out, description, model.state_dict(), tokenizer)
    (config.out / _SETTINGS_FILE).write_text(json.dumps(_settings(config), indent=1) + "\n", encoding="utf-8")
    tell(f"written: {config.out}")


def _is_there(config: StartingWeightsConfig) -> bool:
    path = config.out / _SETTINGS_FILE
    if not path.is_file():
        return False
    if unlike := differences(json.loads(path.read_text(encoding="utf-8")), _settings(config)):
        raise ConfigError(f"{config.out} holds other starting weights ({'; '.join(unlike)}): choose another `out`")
    return True


def _settings(config: StartingWeightsConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"work_dir", "out", "corpus"})


def _start_wide(module: nn.Module) -> None:
    """Fresh weights as torch draws them, by the width of their inputs.

    The published deviation of 0.02 is made for a width of 768; at one of 64 it leaves attention without a preference
    and layers without an effect for hundreds of steps.
    """
    if isinstance(module, nn.Linear):
        module.reset_parameters()
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def _train_pictures(model: AlproModel, config: StartingWeightsConfig) -> float:
    """Teaches the video encoder, as a ViT on single frames; returns the accuracy in nouns of the last steps."""
    encoder, video = model.dual.video_encoder, config.model.video
    # One frame as it is, and not as four equal ones: the parts that look over time stay fresh.
    encoder.config = video.model_copy(update={"still": "once"})
    spatial = [p for name, p in encoder.named_parameters() if "temporal" not in name and name != "time_embed"]
    corpus = read_corpus_config(config.corpus)
    first = 0 if config.classes == "all" else corpus.num_nouns
    nouns = range(first, len(NOUNS))
    if not nouns:
        raise ConfigError(f"classes=others, and {config.corpus} shows all {len(NOUNS)} objects: set classes=all")
    head = nn.Linear(video.width, len(nouns) + len(COLOURS))
    random, right = Random(f"pictures/{config.seed}"), list[float]()

    def step(number: int) -> Tensor:
        things = [_draw_thing(random, nouns, corpus) for _ in range(config.pictures.batch_size)]
        frames = [
            draw_picture(
                thing,
                (random.randrange(GRID), random.randrange(GRID)),
                video.image_size // GRID,
                (config.seed, number, index),
            )
            for index, thing in enumerate(things)
        ]
        cls_BD = encoder(normalise(torch.from_numpy(np.stack(frames)[:, None])))[:, 0]
        noun_BP, colour_BP = head(cls_BD).split([len(nouns), len(COLOURS)], dim=1)
        noun_B = torch.tensor([thing.noun - first for thing in things])
        colour_B = torch.tensor([thing.colour for thing in things])
        right.append(float((noun_BP.argmax(dim=1) == noun_B).double().mean()))
        return cross_entropy(noun_BP, noun_B) + cross_entropy(colour_BP, colour_B)

    _minimise(step, [*spatial, *head.parameters()], config.pictures)
    encoder.config = video
    # Attention over time begins as a copy of what attention over space has become.
    encoder.start_time_as_identity()
    return float(np.mean(right[-_LAST:]))


def _draw_thing(random: Random, nouns: range, corpus: CorpusConfig) -> Thing:
    """With any colour, but for the pairs that held-out clips are about."""
    while True:
        thing = Thing(noun=random.choice(nouns), colour=random.randrange(len(COLOURS)))
        if thing.noun >= corpus.num_nouns or split_of(thing.noun, thing.colour, corpus.held_out) == "train":
            return thing


def _train_captions(model: AlproModel, tokenizer: Tokenizer, config: StartingWeightsConfig) -> float:
    """Teaches text and multimodal encoder to fill in words, without a video; returns the loss of the last steps."""
    captions = list(_training_captions(config.corpus))
    random, losses = Random(f"captions/{config.seed}"), list[float]()

    def step(number: int) -> Tensor:
        chosen = [random.randrange(len(captions)) for _ in range(config.captions.batch_size)]
        ids_BL, mask_BL = tokenizer([captions[index] for index in chosen])
        keys_B = sample_keys([(config.seed, number, row) for row in range(len(chosen))], "starting weights")
        masked = tokenizer.mask(ids_BL.numpy(), keys_B, config.text.mlm_probability)
        text_BLD = model.dual.text_encoder(torch.from_numpy(masked.ids_BL), mask_BL)
        no_video_BND = text_BLD.new_zeros(len(chosen), 0, text_BLD.shape[-1])
        logits_BLV = model.word_logits(model.multimodal(text_BLD, mask_BL, no_video_BND))
        loss = mlm_loss(logits_BLV, torch.from_numpy(masked.labels_BL))
        losses.append(loss.item())
        return loss

    assert model.mlm_head is not None
    parts = (model.dual.text_encoder, model.multimodal, model.mlm_head)
    _minimise(step, [parameter for part in parts for parameter in part.parameters()], config.captions)
    return float(np.mean(losses[-_LAST:]))


def _minimise(step: Callable[[int], Tensor], parameters: list[nn.Parameter], config: StepsConfig) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.max_steps + 1, pct_start=0.05, cycle_momentum=False
    )
    for number in range(config.max_steps):
        optimizer.zero_grad()
        step(number).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _training_captions(corpus: Path) -> Iterator[str]:
    with (corpus / MANIFEST_FILE).open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["split"] == "train":
                yield row["captions"][0]
