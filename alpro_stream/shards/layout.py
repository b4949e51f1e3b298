"""What a data set directory (one split) holds, as described by its ``dataset.json``."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpro_stream.config import Config, validate
from alpro_stream.errors import ConfigError, FetchError, ShardError
from alpro_stream.manifest import Kind, public_place
from alpro_stream.manifest.places import is_address
from alpro_stream.manifest.webdataset import OwnShardError, is_tar_name
from alpro_stream.media import FetchConfig
from alpro_stream.shards.remote_files import join, read_file
from alpro_stream.shards.storage import publish_bytes

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
ENTITIES_FILE = "entities.json"
FAILURES_FILE = "failures.jsonl"
CONFIG_FILE = "shard_config.yaml"
_FETCH = FetchConfig()


class ShardInfo(Config):
    """One shard: a tar and its index."""

    name: str
    """File name without suffix, such as ``video-000000``."""
    kind: Kind
    """All samples of a shard are of one kind."""
    num_samples: int
    """Samples, which is also the number of slots."""
    num_captions: int
    """Captions of all its samples."""
    num_questions: int
    """Question-answer pairs of all its samples."""
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """Digest of the tar."""
    index_sha256: str
    """Digest of the index."""


class DatasetInfo(Config):
    """One split of a shard set."""

    format_version: int = FORMAT_VERSION
    """Version of the shard format; another one is refused."""
    split: str
    """Name of the split, and of its folder."""
    options: dict[str, Any]
    """The sharding options that decide what the samples look like."""
    shards: list[ShardInfo]
    """All shards, videos before images, by number."""
    num_samples: int
    """Total of the shards."""
    num_captions: int
    """Total of the shards."""
    num_questions: int
    """Total of the shards."""
    num_bytes: int
    """Total of the shards' tars."""

    @classmethod
    def of_shards(cls, split: str, options: dict[str, Any], shards: Sequence[ShardInfo]) -> "DatasetInfo":
        """The description of these shards, totals included."""
        return cls(
            split=split,
            options=options,
            shards=list(shards),
            num_samples=sum(shard.num_samples for shard in shards),
            num_captions=sum(shard.num_captions for shard in shards),
            num_questions=sum(shard.num_questions for shard in shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
        )

    def shards_of(self, kind: Kind) -> list[ShardInfo]:
        """The shards of one kind, in order."""
        return [shard for shard in self.shards if shard.kind == kind]

    @property
    def digest(self) -> str:
        """SHA-256 over names and digests of all shards and indexes: equal digests mean equal samples."""
        total = hashlib.sha256(f"alpro shards v{self.format_version}\n".encode())
        for shard in self.shards:
            total.update(f"{shard.name} {shard.sha256} {shard.index_sha256}\n".encode())
        if columns := self.options.get("columns"):  # of tars of other tools, they decide which text is the caption
            total.update(json.dumps(columns, sort_keys=True).encode())
        return total.hexdigest()


def shard_name(kind: Kind, number: int) -> str:
    """``video-000000`` and so on."""
    return f"{kind}-{number:06d}"


def tar_path(directory: Path, name: str) -> Path:
    """The shard's tar."""
    return directory / f"{name}.tar"


def index_path(directory: Path, name: str) -> Path:
    """The shard's index, published after the tar."""
    return directory / f"{name}.idx"


def save_dataset_info(directory: Path, info: DatasetInfo) -> None:
    """Writes ``dataset.json`` atomically."""
    text = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    publish_bytes(directory / DATASET_FILE, text.encode("utf-8"))


def load_dataset_info(place: str | Path, fetch: FetchConfig = _FETCH) -> DatasetInfo:
    """Reads the description of a split; tars of other tools that have none are described, see `describe_tars`.

    Args:
        place: the folder, or its address: ``s3://``, ``http://`` or ``https://``.
        fetch: how a file behind an address is fetched.

    Raises:
        ShardError: no such folder, or a file; no ``dataset.json`` in it and no tars (folders below that have one are
            named), a damaged one, another format version, or one that lists no shards.
    """
    if is_address(str(place)):
        path = join(str(place), DATASET_FILE)
        try:
            return _parse(read_file(path, fetch), public_place(path))
        except ShardError as error:
            if not (isinstance(error.__cause__, FetchError) and str(error.__cause__).startswith("missing")):
                raise
            raise ShardError(
                f"{error}; shards behind an address need the {DATASET_FILE} that `alpro shard` writes: for tars of "
                "another tool, run it with in_place=true and payload=video on a local copy, and put that file and the "
                "indexes (.idx) beside the tars"
            ) from error
    try:
        return _load_local(Path(place), fetch)
    except OSError as error:
        raise ShardError(f"{place} cannot be read: {error.strerror or error}") from error


def _load_local(directory: Path, fetch: FetchConfig) -> DatasetInfo:
    path = directory / DATASET_FILE
    if path.is_file():
        return _parse(read_file(str(path), fetch), str(path))
    names = [child.name for child in directory.iterdir()] if directory.is_dir() else []
    if any(is_tar_name(name) and not name.startswith(".") for name in names):
        from alpro_stream.shards.foreign import describe_tars  # which describes them in terms of this module

        try:
            return describe_tars(directory)
        except OwnShardError:
            pass
    raise ShardError(_explain_missing(directory))


def _parse(data: bytes, path: str) -> DatasetInfo:
    try:
        values = json.loads(data)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION}; "
                "shard the corpus again with `alpro shard`"
            )
        info = validate(DatasetInfo, values, source=path)
    except (ValueError, RecursionError, ConfigError) as error:
        raise ShardError(f"{path} cannot be read as a data set description: {error}") from error
    if not info.shards:
        raise ShardError(f"{path} lists no shards; shard the corpus again with `alpro shard`")
    return info


def _explain_missing(directory: Path) -> str:
    if directory.is_file():
        return f"{directory} is a file, and a data set is a folder of shards: name its folder, {directory.parent}"
    if not directory.is_dir():
        return f"no such shard folder: {directory}; make one with `alpro shard CONFIG`, or correct the path"
    splits = sorted(str(found.parent) for found in directory.glob(f"*/{DATASET_FILE}"))
    if splits:
        return f"{directory} has no {DATASET_FILE}; name the folder of a split instead: {', '.join(splits)}"
    if not any(directory.iterdir()):
        return f"{directory} is empty; expected shards and a {DATASET_FILE}, made with `alpro shard CONFIG`"
    return (
        f"{directory} has no {DATASET_FILE}: not a shard folder, or its sharding did not finish; "
        "run the same `alpro shard CONFIG` again to complete it"
    )
