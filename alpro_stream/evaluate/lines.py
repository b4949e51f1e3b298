"""Files of JSON lines about clips of a data set, for evaluations that ask more than captions and questions say."""

import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict

from alpro_stream.config import Config, validate
from alpro_stream.errors import ConfigError, DataError


class ClipLine(Config):
    """What a line says of one clip; other fields than those that are needed may stand there too."""

    model_config = ConfigDict(extra="ignore")

    id: str
    """Of the clip, as in its manifest."""


LineT = TypeVar("LineT", bound=ClipLine)


def read_lines(path: Path, model: type[LineT], keys: Set[str]) -> tuple[list[LineT], int]:
    """The lines about clips that are there, and how many there are about others.

    Args:
        path: a JSON object a line.
        model: of a line.
        keys: of the clips.

    Raises:
        ConfigError: the file cannot be read, or a line is not as it should be.
        DataError: no line is about one of the clips.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no file of JSON lines: {error}") from error
    lines = [validate(model, row, source=f"{path}, line {number}") for number, row in enumerate(rows, start=1)]
    known = [line for line in lines if line.id in keys]
    if not known:
        example = f", such as {lines[0].id!r}, where the data set has {min(keys, default='none')!r}" if lines else ""
        raise DataError(f"none of the {len(lines)} lines of {path} is about a clip of the data sets{example}")
    return known, len(lines) - len(known)


def by_clip(lines: Sequence[LineT]) -> dict[str, list[int]]:
    """Numbers of the lines about each clip."""
    numbers: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        numbers.setdefault(line.id, []).append(number)
    return numbers
