"""The options of sharding."""

from pathlib import Path
from typing import Any

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.shards.sample import MAX_FRAMES


class WordpieceConfig(Config):
    """A BERT WordPiece vocabulary trained on the corpus, for runs that cannot take a published one."""

    vocab_size: int = Field(default=30522, ge=256)
    """Most entries of the vocabulary, the five special ones included; a small corpus gives fewer."""
    extra_texts: tuple[str, ...] = (
        "a video of a footage of one clip of the",
        "a photo of a picture of one image of the",
    )
    """Texts whose words are in the vocabulary too: those of the prompts, which captions need not hold."""


class ShardConfig(Config):
    """Everything `alpro shard` can be told."""

    manifest: str
    """File of JSON lines, one video or image each; media paths in it are relative to its folder."""
    work_dir: str = "runs/shard"
    """Folder of the run; only here so that other values can name it as ``${work_dir}``."""
    out: str
    """Folder of the shard set; on a cluster a folder that all nodes see."""
    fps: float = Field(default=3.0, gt=0, le=1000)
    """Frames stored for each second of a video."""
    max_frames: int = Field(default=64, ge=1, le=MAX_FRAMES)
    """Most frames stored for a video; a longer one stores that many, spread over all of it."""
    size: int = Field(default=256, ge=16, le=4096)
    """Side of the stored frames in pixels; frames are squared whatever their aspect ratio."""
    quality: int = Field(default=90, ge=1, le=95)
    """JPEG quality; 95 is the most that saves anything."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Manifest rows planned for each shard; rows that fail leave a shard smaller."""
    num_entities: int = Field(default=1000, ge=1)
    """Most nouns kept in ``entities.json``."""
    wordpiece: WordpieceConfig | None = None
    """Train a WordPiece vocabulary into ``OUT/tokenizer``; null to train none."""
    num_workers: int | None = Field(default=None, ge=1)
    """Shards made at the same time; null for one a core."""

    def sample_options(self) -> dict[str, Any]:
        """The options that decide the bytes of the shards; shards made with other ones do not mix."""
        return self.model_dump(include={"fps", "max_frames", "size", "quality", "samples_per_shard"}, mode="json")

    @property
    def out_dir(self) -> Path:
        """`out` as an absolute path, which means the same in every worker."""
        return Path(self.out).absolute()

    @property
    def manifest_path(self) -> Path:
        """`manifest` as an absolute path."""
        return Path(self.manifest).absolute()
