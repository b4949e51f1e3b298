"""What every evaluation of a checkpoint begins with."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.aggregate import Aggregation
from alpro_stream.evaluate.embed import StoredClip, evenly_spread, stored_clips
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.overlap import check_each_once, num_trained_on
from alpro_stream.media import FetchConfig, FrameConfig
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import Source, SourceConfig, closing_storage, open_sources, read_listings
from alpro_stream.train.distributed import World
from alpro_stream.train.restore import Trained, load_trained, model_folder

logger = logging.getLogger(__name__)


class EvaluationConfig(Config):
    """A checkpoint, the data it is shown, and how."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    task: str
    """What is evaluated."""
    checkpoint: Path
    """Run, checkpoint or exported model."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets; all their videos and images are looked at."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames of a clip; null takes the model's. Another number resizes its time embeddings, as published."""
    num_clips: int = Field(default=1, ge=1)
    """Clips of so many frames that a video is cut into; each is scored by itself."""
    aggregation: Aggregation = "mean"
    """How the logits of these clips become one score: mean, max, or log-sum-exp."""
    num_tokens: int | None = Field(default=None, ge=3)
    """Length of a text in tokens; null takes the model's."""
    batch_size: int = Field(default=32, ge=1)
    """Clips, texts or pairs that go through the model at once."""
    out: Path
    """Folder for result.json and what else is written."""
    timeout_s: float = Field(default=3600.0, gt=0, le=7 * 86_400)
    """Longest wait of a rank for another one."""
    video: FrameConfig = FrameConfig()
    """Where whole videos are stored: the frames that are chosen from."""
    decode: DecodeConfig = DecodeConfig()
    """Bytes to pixels."""
    cache: CacheConfig = CacheConfig()
    """Where shards behind addresses are kept; unused when all are local."""
    fetch: FetchConfig = FetchConfig()
    """How they are fetched."""


@dataclass(frozen=True)
class Opened:
    """The model, and the clips that it is shown."""

    sources: tuple[Source, ...]
    clips: list[StoredClip]
    trained: Trained
    num_trained_on: int | None
    """Clips that its run was trained on; None where that is not known."""


@contextmanager
def opened(config: EvaluationConfig, world: World) -> Iterator[Opened]:
    """Data and checkpoint, on every rank; the data can be read inside the block.

    Raises:
        AlproError: they are not there, cannot be read, or do not fit each other.
    """
    with closing_storage(config.sources, config.cache, config.fetch) as storage:
        world.stage.enter("the opening of data and checkpoint")
        world.from_first(lambda: _check_writable(config.out), "whether the folder can be written to")
        listings, folder = world.from_first(
            lambda: (read_listings(config.sources, storage=storage), model_folder(config.checkpoint)),
            "the descriptions of the data sets",
        )
        with world.all_or_none():
            sources = open_sources(config.sources, storage=storage, listings=listings)
            clips = stored_clips(sources)
            check_each_once(clips)
            trained = load_trained(folder, world.device, config.num_frames)
        keys = {clip.key for clip in clips}
        known = world.from_first(lambda: num_trained_on(keys, folder), "what the model was trained on")
        if known and world.is_first:
            told = "%d of the %d videos and images are among those that %s was trained on: it may know them by heart"
            logger.warning(told, known, len(clips), folder)
        yield Opened(sources, clips, trained, known)


def _check_writable(out: Path) -> None:
    """Before the hours of work that end there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written to ({error.strerror}): set out to a folder that can") from error


@contextmanager
def encoding(config: EvaluationConfig, trained: Trained, world: World) -> Iterator[Encoding]:
    """How the clips and texts are encoded; the decoder ends with the block."""
    video = trained.dual.config.video
    max_frames = max(config.batch_size, config.num_clips) * video.num_frames
    device_id = world.device.index or 0 if world.device.type == "cuda" else None
    decoder = build_clip_decoder(config.decode, video.image_size, max_frames, device_id)
    try:
        choice = evenly_spread(config.num_clips * video.num_frames, config.video)
        yield Encoding(choice, decoder, trained.tokenizer, config.batch_size, config.num_clips, config.num_tokens)
    finally:
        decoder.close()


def of_frames(config: EvaluationConfig, trained: Trained) -> dict[str, Any]:
    """What a protocol says of frames, clips and the length of texts."""
    video, num_clips = trained.dual.config.video, config.num_clips
    return {
        "num_frames": video.num_frames,
        "num_clips": num_clips,
        "aggregation": config.aggregation if num_clips > 1 else None,
        "frames": "spread evenly over the video, those of a clip follow each other",
        "picture": f"whole frame resized to {video.image_size}",
        "num_tokens": config.num_tokens or trained.description.num_tokens,
    }
