"""The options of sharding."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from alpro_sharding.entities import EntityConfig
from alpro_sharding.filters import FilterConfig
from alpro_sharding.media_messages import LimitConfig, Payload
from alpro_stream.config import Config
from alpro_stream.manifest import ManifestConfig
from alpro_stream.media import FetchConfig, FrameConfig, VideoConfig


class WordpieceConfig(Config):
    """A BERT WordPiece vocabulary trained on the corpus, for runs that cannot take a published one."""

    vocab_size: int = Field(default=30522, ge=256)
    """Most entries of the vocabulary, the five special ones included; a small corpus gives fewer."""
    extra_texts: tuple[str, ...] = (
        "a video of a footage of one clip of the",
        "a photo of a picture of one image of the",
    )
    """Texts whose words are in the vocabulary too: those of the prompts, which captions need not hold."""


class SampleOptions(Config):
    """The options that decide the bytes of the shards; shards made with other ones do not mix."""

    payload: Payload = "frames"
    """What a sample holds: `frames`, or the `video` itself (an image is a frame either way)."""
    frames: FrameConfig = FrameConfig()
    """How videos and images become stored frames."""
    video: VideoConfig = VideoConfig()
    """How a video becomes a stored video."""
    filters: FilterConfig = FilterConfig()
    """Which rows are left out on purpose."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Manifest rows planned for each shard; rows that fail leave a shard smaller."""

    def sample_options(self) -> dict[str, Any]:
        """These options as plain values, those of the other payload left out."""
        unused = "video" if self.payload == "frames" else ""
        return self.model_dump(include=set(SampleOptions.model_fields) - {unused}, mode="json")


class ShardConfig(SampleOptions):
    """Everything `alpro shard` can be told."""

    manifest: str
    """The corpus: a table, an annotation file, a folder of media, or tars; see docs/manifests.md."""
    reading: ManifestConfig = ManifestConfig()
    """How the manifest is read."""
    append: bool = False
    """Add the rows of this manifest to a shard set that another manifest gave."""
    moved_media: bool = False
    """The same media are elsewhere than when the shards of this manifest were begun."""
    work_dir: str = "runs/shard"
    """Folder of the run; only here so that other values can name it as ``${work_dir}``."""
    out: str
    """Folder of the shard set; on a cluster a folder that all nodes see."""
    in_place: bool = False
    """Only index the WebDataset tars of `manifest`, all in the folder `out`; nothing is decoded."""
    entities: EntityConfig = EntityConfig()
    """The entity vocabulary."""
    wordpiece: WordpieceConfig | None = None
    """Train a WordPiece vocabulary into ``OUT/tokenizer``; null to train none."""
    fetch: FetchConfig = FetchConfig()
    """How media behind addresses are fetched."""
    limits: LimitConfig = LimitConfig()
    """What one file may cost."""
    num_workers: int | None = Field(default=None, ge=1)
    """Shards made at the same time; null for one a core."""
    contact: str | None = None
    """Whom to ask for removal of a clip; written into the dataset card."""

    @model_validator(mode="after")
    def _in_place_keeps_what_is_there(self) -> "ShardConfig":
        if self.in_place and self.payload != "video":
            raise ValueError("in_place indexes tars as they are: set payload=video")
        unused = {
            "filters": self.filters != FilterConfig(),
            "append": self.append,
            "wordpiece": self.wordpiece is not None,
        }
        if self.in_place and any(unused.values()):
            names = ", ".join(name for name, is_set in unused.items() if is_set)
            raise ValueError(
                f"in_place indexes tars as they are and cannot heed {names}; remove it, or set in_place=false"
            )
        looks = {name: getattr(self.filters, name) for name in ("drop_static", "drop_black")}
        if self.payload == "video" and any(value is not None for value in looks.values()):
            raise ValueError("filters.drop_static and filters.drop_black look at stored frames; payload=video has none")
        return self

    @property
    def out_dir(self) -> Path:
        """`out` as an absolute path, which means the same in every worker."""
        return Path(self.out).absolute()
