"""An index: the features of all clips of some data sets, and what is known of each clip.

::

    INDEX/
        index.json           what was embedded, by what, how; `parts` once all of them are there
        parts/00000.npy      features of a shard's clips, one row each
        parts/00000.jsonl    a line for each row: source, shard, slot, key, captions, media
        parts/00000.json     counts, what was left out, SHA-256 of the two; written last
"""

import bisect
import json
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alpro_stream.config import Config, differences, validate
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.media import FetchConfig, FrameConfig
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.shards.storage import file_digest, publish_bytes
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig

INDEX_FILE = "index.json"
_AGAIN = "run the same `alpro embed` again, which makes what is missing"


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


class Part(Config):
    """The clips of one shard."""

    source: str
    """Name of the source."""
    shard: str
    """Name of the shard."""
    num_clips: int
    """Rows."""
    left_out: tuple[str, ...]
    """Samples that could not be read or decoded: shard, slot, key and reason."""
    features_sha256: str
    """Digest of the .npy file."""
    rows_sha256: str
    """Digest of the .jsonl file."""


class IndexDescription(Config):
    """What index.json says."""

    format_version: Literal[1] = 1
    """Of the folder."""
    checkpoint: Path
    """Model folder that the features are of."""
    weights_sha256: str
    """Digest of its weights."""
    data: dict[str, str]
    """Digest of the samples of each source."""
    dimension: int
    """Numbers of a feature."""
    num_frames: int
    """Frames of a clip, spread evenly over it."""
    image_size: int
    """To which a whole frame is resized."""
    versions: dict[str, str]
    """Of the packages."""
    config: EmbedConfig
    """How it was made; `sources` also say where the clips are found again."""
    parts: tuple[Part, ...] | None = None
    """By number, one for each shard; None while some are missing."""

    def identity(self) -> dict[str, Any]:
        """What all parts of an index have in common."""
        names = {"weights_sha256", "data", "dimension", "num_frames", "image_size"}
        video = self.config.video.model_dump(mode="json")
        return {**self.model_dump(mode="json", include=names), "dtype": self.config.dtype, "video": video}


@dataclass(frozen=True, slots=True)
class IndexRow:
    """What is known of a clip.

    Attributes:
        source: name of its source.
        shard: of the source.
        slot: in the shard.
        key: of the sample.
        captions: all of them.
        media: the video or image that it was made from, as its manifest names it; empty where that is not known.
    """

    source: str
    shard: str
    slot: int
    key: str
    captions: tuple[str, ...]
    media: str

    def to_json(self) -> str:
        """A line of a .jsonl file."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: bytes) -> "IndexRow":
        """Reads a line of a .jsonl file."""
        fields = json.loads(line)
        return cls(**{**fields, "captions": tuple(fields["captions"])})


def part_path(directory: Path, number: int, suffix: str) -> Path:
    """A file of a part; named by its number, as names of sources and shards may be any text."""
    return directory / "parts" / f"{number:05d}.{suffix}"


def begin_index(directory: Path, description: IndexDescription) -> None:
    """Writes index.json, or finds it there and of the same clips and model; every rank may do so.

    Raises:
        ConfigError: the folder holds an index of something else.
    """
    (directory / "parts").mkdir(parents=True, exist_ok=True)
    if not (directory / INDEX_FILE).is_file():
        write_description(directory, description)
        return
    unlike = differences(description.identity(), read_description(directory).identity())
    if unlike:
        raise ConfigError(
            f"{directory} holds an index of something else ({'; '.join(unlike)}: wanted != there); set another out, or "
            "remove that folder"
        )


def write_description(directory: Path, description: IndexDescription) -> None:
    """Writes index.json, whole or not at all."""
    _write(directory / INDEX_FILE, description)


def read_description(directory: Path) -> IndexDescription:
    """Reads index.json.

    Raises:
        ShardError: it is missing, damaged, or of another format.
    """
    path = directory / INDEX_FILE
    try:
        return validate(IndexDescription, json.loads(path.read_text(encoding="utf-8")), source=str(path))
    except FileNotFoundError as error:
        raise ShardError(f"{directory} is no index: it has no {INDEX_FILE}; make one with `alpro embed`") from error
    except (OSError, ValueError, ConfigError) as error:
        raise ShardError(f"{path} cannot be read as an index: {error}; make it anew with `alpro embed`") from error


def read_part(directory: Path, number: int) -> Part | None:
    """What a part says of itself; None where it does not, or is not there."""
    try:
        mark = part_path(directory, number, "json")
        return validate(Part, json.loads(mark.read_text(encoding="utf-8")), source=str(mark))
    except (OSError, ValueError, ConfigError):
        return None


def write_part(directory: Path, number: int, part: Part) -> None:
    """Marks a part as whole."""
    _write(part_path(directory, number, "json"), part)


def _write(path: Path, values: Config) -> None:
    publish_bytes(path, (json.dumps(values.model_dump(mode="json"), indent=1) + "\n").encode("ascii"))


def damaged_file(directory: Path, number: int, part: Part) -> Path | None:
    """The first file of a part that is missing, or has another digest than the part says."""
    for suffix, digest in (("npy", part.features_sha256), ("jsonl", part.rows_sha256)):
        path = part_path(directory, number, suffix)
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None


class Index:
    """The features and rows of an index; rows are numbered through all parts.

    Attributes:
        directory: its folder.
        description: index.json.
        features: of each part, (clips, E) in the stored type, mapped from the disk.

    Args:
        directory: its folder.

    Raises:
        ShardError: there is none, it is not finished, it has no clips, or a file of it is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.description = read_description(directory)
        if self.description.parts is None:
            raise ShardError(f"{directory} is not finished: some parts are missing; {_AGAIN}")
        for number, part in enumerate(self.description.parts):
            if path := damaged_file(directory, number, part):
                raise ShardError(
                    f"{path} is missing or damaged: its SHA-256 is not that of {INDEX_FILE}; remove it, and {_AGAIN}"
                )
        # An empty file cannot be mapped.
        self._numbers = [number for number, part in enumerate(self.description.parts) if part.num_clips]
        if not self._numbers:
            raise ShardError(f"{directory} has no clips: nothing can be found in it; embed data sets that have some")
        self.features = [_map_features(part_path(directory, number, "npy")) for number in self._numbers]
        self._ends = list(accumulate(len(features_NE) for features_NE in self.features))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, number: int) -> IndexRow:
        """What is known of a clip.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        place = bisect.bisect_right(self._ends, number)
        lines = part_path(self.directory, self._numbers[place], "jsonl").read_bytes().split(b"\n")
        return IndexRow.from_json(lines[number - (self._ends[place] - len(self.features[place]))])


def _map_features(path: Path) -> Tensor:
    # Copy on write: torch wants memory that it could write to.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
