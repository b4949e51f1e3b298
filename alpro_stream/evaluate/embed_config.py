"""The configuration of `alpro embed`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.media import FetchConfig, FrameConfig
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig


class EmbedConfig(Config):
    """The clips of some data sets to features."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file."""
    checkpoint: Path
    """Run, checkpoint or exported model."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Data sets; all their clips are embedded."""
    out: Path
    """Folder of the index."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored features; float16 takes half the room, and scores are equal to three digits."""
    batch_size: int = Field(default=32, ge=1)
    """Clips that go through the model at once."""
    video: FrameConfig = FrameConfig()
    """Where whole videos are stored: the frames that are chosen from."""
    decode: DecodeConfig = DecodeConfig()
    """Bytes to pixels."""
    cache: CacheConfig = CacheConfig()
    """Where shards behind addresses are kept; unused when all are local."""
    fetch: FetchConfig = FetchConfig()
    """How they are fetched."""
