"""`result.json`, which says by itself how it was made, and the scores beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from alpro_stream.config import differences
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.queries import Queries
from alpro_stream.evaluate.ranking import BothWays

RESULT_FILE = "result.json"

Score = Literal["vtc", "vtm"]

_TASKS = ("retrieval", "question_answering", "recognition")


def write_scores(
    directory: Path, scores: Mapping[Score, BothWays[Tensor]], keys: Sequence[str], queries: Queries
) -> None:
    """Writes `scores.npz`: matrices of captions by videos under the name of the score, and what their rows are.

    Where re-ranking makes the two directions differ, that of videos to texts has a matrix of its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for name, both in scores.items():
        arrays[name] = both.text_to_video.numpy()
        if not both.text_to_video.equal(both.video_to_text):
            arrays[f"{name}_video_to_text"] = both.video_to_text.numpy()
    np.savez(
        directory / "scores.npz",
        keys=np.array(keys),
        captions=np.array(queries.captions),
        truth=queries.truth_C.numpy(),
        **arrays,
    )


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json`, last of all: its presence says that the evaluation is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{RESULT_FILE}.partial"
    aside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.rename(directory / RESULT_FILE)


def read_result(path: Path) -> dict[str, Any]:
    """Reads a `result.json`, or that of a folder.

    Raises:
        ConfigError: there is none, or it is not one of `alpro evaluate`.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; give a {RESULT_FILE} of alpro evaluate") from error
    needed = ("metrics", "protocol", "split", "checkpoint", "config", "versions")
    missing = [name for name in needed if not isinstance(result, dict) or name not in result]
    if missing or result.get("task") not in _TASKS:
        why = f"has no {missing[0]}" if missing else f"is of task {result.get('task')}"
        raise ConfigError(f"{file} is no result of an evaluation (it {why}); give one that alpro evaluate wrote")
    return dict(result)


def unlike(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two results differ: figures, protocol, split and weights; not where they lie, nor versions."""
    return differences(_of_substance(result), _of_substance(other))


def _of_substance(result: Mapping[str, Any]) -> dict[str, Any]:
    weights = result["checkpoint"]["weights_sha256"]
    return {**{name: result[name] for name in ("metrics", "protocol", "split")}, "weights_sha256": weights}
