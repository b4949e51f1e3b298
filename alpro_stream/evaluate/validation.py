"""What a model in training is worth on data that it does not train on: losses and retrieval, while it goes on.

Nothing here changes the run: no gradients, no dropout, no draws from the run's own.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError, PlanError, SampleError
from alpro_stream.evaluate.embed import StoredClip, evenly_spread, pixels_of, stored_clips
from alpro_stream.evaluate.features import Encoding, encode_share, similarities
from alpro_stream.evaluate.overlap import keys_of, num_shared
from alpro_stream.evaluate.queries import different_texts, queries_of
from alpro_stream.evaluate.ranking import BothWays, metrics_both_ways
from alpro_stream.losses.objective import SoftLabels
from alpro_stream.manifest.places import is_address
from alpro_stream.model.alpro import AlproModel, DualEncoder
from alpro_stream.model.video_encoder import VideoEncoderConfig
from alpro_stream.stream.clips import ClipDecoder, build_clip_decoder
from alpro_stream.stream.config import StreamConfig, make_plan
from alpro_stream.stream.isolated import FrameChoice
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.plan import Plan, lanes_of_rank
from alpro_stream.stream.sources import Source, SourceConfig, closing_storage, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.distributed import World
from alpro_stream.train.engine import Engine
from alpro_stream.train.step import Step

logger = logging.getLogger(__name__)

_RECALL_AT = (1, 5)
# With one there is nothing to confuse it with.
_FEWEST_CLIPS = 2


class ValidationConfig(Config):
    """Looks at held-out data while the run goes on."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets that are not trained on, as in `stream.sources`."""
    every: int = Field(default=1000, ge=1)
    """Steps between two looks; there is one after the last step too."""
    num_batches: int | None = Field(default=None, ge=0)
    """Global batches whose losses are averaged, always the same; null takes one pass, 0 leaves them out. Without PEM,
    whose labels come from the prompter, which is busy with the run."""
    num_clips: int = Field(default=1000, ge=0)
    """Most clips of retrieval by VTC, the first of the data sets, with all their captions; 0 leaves it out, and so does
    question answering."""
    batch_size: int = Field(default=32, ge=1)
    """Clips or captions that a rank embeds at once."""


@dataclass
class Validator:
    """See `alpro_stream.train.trainer.Validation`.

    Attributes:
        every: steps between two looks.
        config: what to look at.
        maker: batches of the held-out data.
        plan: their order.
        clips: those of retrieval.
        engine: the model in training.
        step: how it computes losses.
        world: the ranks.
        tokenizer: of the model.
        num_entities: M of PEM's head, 0 without PEM.
    """

    every: int
    config: ValidationConfig
    maker: BatchMaker
    plan: Plan | None
    clips: tuple[StoredClip, ...]
    engine: Engine
    step: Step
    world: World
    tokenizer: Tokenizer
    num_entities: int

    def __call__(self) -> dict[str, float]:
        """``validation/LOSS``, the mean over the batches, and ``validation/text_to_video_r1`` and so on, in percent.

        Raises:
            AlproError: a held-out clip cannot be read, on this rank or on another.
        """
        figures = (self._losses() if self.plan else {}) | (self._retrieval() if self.clips else {})
        return {f"validation/{name}": value for name, value in figures.items()}

    def _losses(self) -> dict[str, float]:
        assert self.plan is not None
        num_batches = self.plan.steps_per_epoch if self.config.num_batches is None else self.config.num_batches
        sums: dict[str, Tensor] = {}
        for number in range(num_batches):
            self.world.stage.enter(f"batch {number + 1} of the validation")
            with self.world.all_or_none("the held-out batches of all ranks"):
                lanes = lanes_of_rank(self.world.rank, self.world.size, self.plan.num_lanes)
                batch = self.maker.make(self.plan, number, lanes).to(self.world.device)
            labels = None
            if self.num_entities:
                labels_BM = torch.zeros(len(batch), self.num_entities, device=self.world.device)
                labels = SoftLabels(labels_BM, torch.zeros_like(batch.valid_B))
            for name, value in self.step.measure(batch, labels).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / num_batches
        sums.pop("loss/pem", None)
        if not sums:
            return {}
        means = self.world.sum(torch.stack(list(sums.values())))
        return {name.removeprefix("loss/"): value for name, value in zip(sums, means.tolist(), strict=True)}

    def _retrieval(self) -> dict[str, float]:
        """By the features of the dual encoder; each rank embeds its part of the clips."""
        model = self.engine.module.model
        assert isinstance(model, AlproModel | DualEncoder)
        encoder = model.dual if isinstance(model, AlproModel) else model
        self.world.stage.enter("the retrieval of the validation")
        choice, decoder = evenly_spread(self.maker.num_frames, self.maker.config.video), self.maker.decoder
        how = Encoding(choice, decoder, self.tokenizer, self.config.batch_size)
        with self.world.all_or_none("the held-out clips of all ranks"), self.engine.evaluating(whole=True):
            queries = queries_of(self.clips)
            different = different_texts(queries.captions, self.tokenizer)
            features = encode_share(encoder, self.clips, different.texts, how, self.world)
        scores_CV = similarities(features, len(different.texts), len(self.clips), self.world).cpu()[different.text_C]
        metrics = metrics_both_ways(BothWays(scores_CV, scores_CV), queries.truth_C)
        figures: dict[str, float] = {}
        for direction, found in vars(metrics).items():
            figures |= {f"{direction}_r{k}": float(getattr(found, f"recall_at_{k}")) for k in _RECALL_AT}
            figures[f"{direction}_median_rank"] = float(found.median_rank)
        return figures


def open_validation(
    config: ValidationConfig,
    stream: StreamConfig,
    video: VideoEncoderConfig,
    tokenizer: Tokenizer,
    num_entities: int,
    world: World,
    stack: ExitStack,
) -> Callable[[Engine, int], Validator]:
    """Opens the held-out data; the rest is done when the engine is there.

    Args:
        config: what to look at.
        stream: of the run, for everything but the sources and augmentation.
        video: of the model.
        tokenizer: of the model.
        num_entities: M of PEM's head, 0 without PEM.
        world: the ranks.
        stack: ends what is opened.

    Returns:
        A function of the engine and its number of micro-batches.

    Raises:
        AlproError: the data cannot be opened, or are too few.
    """
    unit = "question" if stream.unit == "question" else "clip"
    trained_on = stream.sources
    changes = {"sources": config.sources, "augment": "none", "crop_only_probability": 0.0, "unit": unit}
    stream = stream.model_copy(update=changes)
    storage = stack.enter_context(closing_storage(stream.sources, stream.cache, stream.fetch))
    sources = open_sources(stream.sources, stream.unit, storage)
    for source in sources:
        stack.callback(source.reader.close)
    if world.is_first:
        warn_of_known(sources, trained_on)
    max_frames = max(stream.global_batch // world.size, config.batch_size) * video.num_frames
    device_id = world.local_rank if world.device.type == "cuda" else None
    decoder = build_clip_decoder(stream.decode, video.image_size, max_frames, device_id)
    maker = BatchMaker(stream, sources, tokenizer, decoder, video.num_frames, video.image_size, video.patch_size)
    stack.callback(maker.close)
    try:
        plan = None if config.num_batches == 0 else make_plan(stream, sources)
    except PlanError as error:
        raise ConfigError(f"validation: {error}; validation.num_batches=0 leaves its losses out") from error
    # A model that answers questions has no features to retrieve by.
    clips = () if unit == "question" else tuple(stored_clips(sources, config.num_clips))
    if 0 < len(clips) < _FEWEST_CLIPS:
        raise ConfigError("validation.sources hold 1 clip, of which retrieval can tell nothing; 2 are needed at least")

    def with_engine(engine: Engine, num_micro_batches: int) -> Validator:
        step = Step(engine, world, num_micro_batches, stream.seed)
        found = readable(clips, evenly_spread(video.num_frames, stream.video), decoder, world)
        return Validator(config.every, config, maker, plan, found, engine, step, world, tokenizer, num_entities)

    return with_engine


def warn_of_known(sources: Sequence[Source], trained_on: Sequence[SourceConfig]) -> None:
    """Says which share of the held-out samples is not held out."""
    keys = {key for source in sources if not is_address(source.reader.place) for key in keys_of(source)}
    if num_known := num_shared(keys, trained_on):
        told = "validation: %d of the %d samples of its data sets are trained on, and say nothing of others"
        logger.warning(told, num_known, len(keys))


def readable(
    clips: Sequence[StoredClip], choice: FrameChoice, decoder: ClipDecoder, world: World
) -> tuple[StoredClip, ...]:
    """The clips that every look can use; the others are named once. All ranks must ask, and get the same.

    A run must not end, each time that it comes to the same look, because of a sample that it does not train on.
    """
    is_bad_V = torch.zeros(len(clips))
    with world.all_or_none("the held-out clips of all ranks"):
        for number in range(world.rank, len(clips), world.size):
            try:
                pixels_of(clips[number : number + 1], choice, decoder)
            except SampleError as error:
                is_bad_V[number] = 1
                logger.warning("validation leaves out %s", error)
    is_bad_V = world.sum(is_bad_V.to(world.device))
    found = tuple(clip for clip, is_bad in zip(clips, is_bad_V.tolist(), strict=True) if not is_bad)
    if len(found) < len(clips) and len(found) < _FEWEST_CLIPS:
        raise ConfigError(
            f"{len(clips) - len(found)} of the {len(clips)} clips of validation.sources cannot be read, see above; "
            f"retrieval needs {_FEWEST_CLIPS}"
        )
    return found
