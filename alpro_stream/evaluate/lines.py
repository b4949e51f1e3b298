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
    lines, number = list[LineT](), 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    lines.append(validate(model, json.loads(line), source=f"{path}, line {number}"))
    except (OSError, ValueError) as error:
        where = f" (line {number})" if number else ""
        raise ConfigError(f"{path} is no file of JSON lines{where}: {error}") from error
    known = [line for line in lines if line.id in keys]
    if not known:
        example = f", such as {lines[0].id!r}, where the data set has {min(keys, default='none')!r}" if lines else ""
        raise DataError(f"none of the {len(lines)} lines of {path} is about a clip of the data sets{example}")
    return known, len(lines) - len(known)


def by_clip(keys: Sequence[str]) -> dict[str, list[int]]:
    """Places of each key in a list of them."""
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places
