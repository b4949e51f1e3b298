"""The files of an index: the features of all clips of some data sets, and what is known of each clip.

::

    INDEX/
        index.json           what was embedded, by what, how; `parts` once all of them are there
        parts/00000.npy      features of a shard's clips, one row each
        parts/00000.jsonl    a line for each row: source, shard, slot, key, captions, media
        parts/00000.json     what it is of, counts, what was left out, SHA-256 of the two; written last
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from alpro_stream.config import Config, differences, validate
from alpro_stream.errors import ConfigError, ShardError
from alpro_stream.evaluate.embed_config import EmbedConfig
from alpro_stream.shards.storage import file_digest, publish_bytes, temporary_beside

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"


class Part(Config):
    """The clips of one shard."""

    identity_sha256: str
    """Digest of what the index was of when the part was made."""
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

    def identity_sha256(self) -> str:
        """Digest of `identity`, which each part has too."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


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

    One that is no description is replaced: each part says by itself what it is of.

    Raises:
        ConfigError: the folder holds an index of something else.
    """
    (directory / "parts").mkdir(parents=True, exist_ok=True)
    path = directory / INDEX_FILE
    if not path.is_file():
        _write_first(path, description)
    try:
        there = _parsed(path)
    except (ValueError, ConfigError) as error:
        logger.warning("%s cannot be read as an index (%s): it is made anew", path, error)
        write_description(directory, description)
        return
    unlike = differences(description.identity(), there.identity())
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
        return _parsed(path)
    except FileNotFoundError as error:
        raise ShardError(f"{directory} is no index: it has no {INDEX_FILE}; make one with `alpro embed`") from error
    except (OSError, ValueError, ConfigError) as error:
        raise ShardError(f"{path} cannot be read as an index: {error}; make it anew with `alpro embed`") from error


def _parsed(path: Path) -> IndexDescription:
    return validate(IndexDescription, json.loads(path.read_text(encoding="utf-8")), source=str(path))


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
    publish_bytes(path, _as_json(values))


def _write_first(path: Path, values: Config) -> None:
    """Writes a file that is not there; of several who do so at once, the first one has written it."""
    aside = temporary_beside(path)
    try:
        publish_bytes(aside, _as_json(values))
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _as_json(values: Config) -> bytes:
    return (json.dumps(values.model_dump(mode="json"), indent=1) + "\n").encode("ascii")


def damaged_file(directory: Path, number: int, part: Part) -> Path | None:
    """The first file of a part that is missing, or has another digest than the part says."""
    for suffix, digest in (("npy", part.features_sha256), ("jsonl", part.rows_sha256)):
        path = part_path(directory, number, suffix)
        if not path.is_file() or file_digest(path) != digest:
            return path
    return None
