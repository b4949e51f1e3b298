"""What is read, in which order, and what is drawn at random: the configuration of a stream and its fingerprint."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from alpro_stream.config import Config
from alpro_stream.media import FetchConfig, FrameConfig
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.stream.augment import Augment
from alpro_stream.stream.cursor import StepRange
from alpro_stream.stream.decode import DecodeConfig, decoder_name
from alpro_stream.stream.frames import FramePolicy
from alpro_stream.stream.plan import PLAN_VERSION, Mix, Plan
from alpro_stream.stream.quarantine import QuarantineConfig
from alpro_stream.stream.sources import Source, SourceConfig
from alpro_stream.stream.text import TextConfig, Tokenizer
from alpro_stream.stream.units import Unit


class StreamConfig(Config):
    """What is read, in which order, and what is drawn at random."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets to read."""
    seed: int = 42
    """Seed of the order and of every draw."""
    global_batch: int = Field(default=256, ge=2)
    """Samples of one optimizer step, over all ranks and micro-batches."""
    num_lanes: int = Field(default=16, ge=1)
    """Parallel streams; fixed for a run, divided by the number of ranks."""
    window_shards: int = Field(default=8, ge=1)
    """K: shards whose samples are mixed together."""
    mix: Mix = "sizes"
    """Which source a step takes: in proportion to sizes or weights, or alternating."""
    unit: Unit = "clip"
    """What a pass counts once: every clip, with one of its captions drawn at random; every caption, with its clip; or
    every question, with its clip and answer."""
    skip_steps: tuple[StepRange, ...] = ()
    """Steps to leave out on purpose, after a loss spike for example, as pairs: ``[[1200, 1250]]`` leaves out 1200 to
    1249. A run may be given more of them when it goes on; the checkpoint records those that were left out."""
    frames: FramePolicy = "headtail"
    """Which stored frames a step takes; `headtail` as in published pre-training, `random` as in fine-tuning."""
    crop_scale: float = Field(default=0.875, gt=0, le=1)
    """Side of the random window over that of the stored frame; published: 224 of 256."""
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    """Mirrors all frames of a clip; captions that say left or right then no longer hold."""
    augment: Augment = "none"
    """Random operations on all frames of a clip alike, see `alpro_stream.stream.augment`: `published` as in the
    authors' code, `increasing` where contrast, brightness and sharpness do change a video. Mirroring is one of them for
    videos, which `flip_probability` then leaves alone; images get a random resized crop instead of `crop_scale`."""
    crop_only_probability: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples of which only PEM's crop is shown, black around it, as a frozen prompter is asked later.
    0 as published; a prompter trained on few clips finds such pictures foreign, and names the same entities for all."""
    video: FrameConfig = FrameConfig()
    """Where whole videos are stored: the frames that a step chooses from, those that `alpro shard` would have stored
    with `payload=frames` and the same options."""
    text: TextConfig
    """Captions to tokens."""
    decode: DecodeConfig = DecodeConfig()
    """Bytes to pixels."""
    quarantine: QuarantineConfig = QuarantineConfig()
    """How many unusable samples a run endures."""
    cache: CacheConfig = CacheConfig()
    """Where shards behind addresses are kept; unused when all are local."""
    fetch: FetchConfig = FetchConfig()
    """How they are fetched."""

    @field_validator("skip_steps", mode="before")
    @classmethod
    def _is_a_list_of_ranges(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(step, int) for step in value):
            raise ValueError(f"expected a list of ranges of steps; write [[{value[0]}, {value[1]}]]")
        return value

    @model_validator(mode="after")
    def _skips_something(self) -> Self:
        for first, stop in self.skip_steps:
            if not 0 <= first < stop:
                raise ValueError(f"skip_steps: [{first}, {stop}] is no range of steps; the second must be larger")
        return self


def make_plan(config: StreamConfig, sources: Sequence[Source]) -> Plan:
    """The order of a run over its opened sources."""
    return Plan(
        [source.shape for source in sources],
        seed=config.seed,
        global_batch=config.global_batch,
        num_lanes=config.num_lanes,
        window_shards=config.window_shards,
        mix=config.mix,
    )


def fingerprint(
    config: StreamConfig, sources: Sequence[Source], tokenizer: Tokenizer, num_frames: int
) -> dict[str, Any]:
    """Everything that decides which pixels and tokens a step gets; compared when a run goes on."""
    # Where data and tokenizer lie and how they are fetched does not matter, what they hold does: their digests stand
    # for them. What was skipped is the cursor's.
    elsewhere: dict[str, Any] = {
        **dict.fromkeys(("sources", "decode", "quarantine", "cache", "fetch", "skip_steps"), True),
        "text": {"tokenizer"},
    }
    if all(source.payload == "frames" for source in sources):
        elsewhere["video"] = True
    most_shards = max(len(source.shards) for source in sources)
    return {
        **config.model_dump(mode="json", exclude=elsewhere),
        # What makes no difference to the order of these sources is none of the run either.
        "mix": _mix(config, sources),
        "window_shards": min(config.window_shards, most_shards),
        "plan_version": PLAN_VERSION,
        # By number: the mix depends on the order of the sources.
        "sources": {str(number): _describe(source, _mix(config, sources)) for number, source in enumerate(sources)},
        "num_frames": num_frames,
        "decoder": decoder_name(config.decode),
        "tokenizer": tokenizer.digest,
    }


def _mix(config: StreamConfig, sources: Sequence[Source]) -> Mix:
    return config.mix if len(sources) > 1 else "sizes"


def _describe(source: Source, mix: Mix) -> dict[str, Any]:
    """What the fingerprint holds of a source; weights count only where they decide the order."""
    return {
        "name": source.name,
        "kind": source.kind,
        "dataset": source.reader.info.digest,
        "exclude": source.listing.exclude_digest,
        "weight": source.weight if mix == "weights" else None,
    }
