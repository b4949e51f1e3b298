"""`result.json`, which says by itself how it was made, and the files beside it."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ConfigDict, Field

from alpro_stream.config import Config, differences, validate
from alpro_stream.errors import ConfigError
from alpro_stream.shards.storage import publish, remove_temporaries, temporary_beside

RESULT_FILE = "result.json"
SCORES_FILE = "scores.npz"
ANSWERS_FILE = "answers.jsonl"
SIDE_FILES = (SCORES_FILE, ANSWERS_FILE)
"""All that an evaluation of any task may write beside its result: what another one left goes with its result."""

Write = Callable[[BinaryIO], object]
"""Writes a whole file."""


class ResultPart(Config):
    """A part of a result: what is read of it, and whatever else was written."""

    model_config = ConfigDict(extra="allow")


class CheckpointOfResult(ResultPart):
    """The weights that a result is of."""

    path: Path
    weights_sha256: str


class Split(ResultPart):
    """The data that a result is of."""

    digest: str
    num_videos: int


class Result(ResultPart):
    """What `result.json` of any task holds; each task has a class that says what its figures are."""

    task: str
    metrics: Mapping[Any, Any] = Field(min_length=1)
    protocol: dict[str, Any]
    split: Split
    checkpoint: CheckpointOfResult
    config: dict[str, Any]
    versions: dict[str, str]


def write_result(directory: Path, result: Mapping[str, Any], files: Mapping[str, Write]) -> None:
    """Writes `result.json`, last of all: its presence says that the files beside it are its own, and whole.

    Args:
        directory: of the result; what an evaluation before wrote there is replaced or removed.
        result: the content.
        files: by name, of `SIDE_FILES`.

    Raises:
        OSError: a full disk, say; there is no result then.
    """
    for name in (RESULT_FILE, *SIDE_FILES):
        (directory / name).unlink(missing_ok=True)
    remove_temporaries(directory)
    for name, write in files.items():
        _write_whole(directory / name, write)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    _write_whole(directory / RESULT_FILE, lambda file: file.write(text.encode("utf-8")))


def _write_whole(path: Path, write: Write) -> None:
    aside = temporary_beside(path)
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_result(path: Path, model: type[Result] = Result) -> dict[str, Any]:
    """Reads a `result.json`, or that of a folder.

    Args:
        path: of either.
        model: what it must hold.

    Raises:
        ConfigError: there is none, or it is not one of `alpro evaluate`.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; give a {RESULT_FILE} of alpro evaluate") from error
    validate(model, result, source=f"{file} is no whole result of alpro evaluate, make it again")
    return dict(result)


def unlike(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two results differ: figures, protocol, split and weights; not where they lie, nor versions."""
    return differences(_of_substance(result), _of_substance(other))


def _of_substance(result: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: result[name] for name in ("metrics", "protocol", "split")}
    # Whether the training data are there to compare with is none of the result.
    parts["split"] = {name: value for name, value in parts["split"].items() if name != "num_trained_on"}
    return {**parts, "weights_sha256": result["checkpoint"]["weights_sha256"]}


def digest_of(value: Any) -> str:
    """SHA-256 of plain data, which are a split as a rule."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
