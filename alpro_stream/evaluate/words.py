"""Lists of words from files: entities, answers, classes."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpro_stream.errors import ConfigError
from alpro_stream.stream.units import same_text

_COUNT = re.compile(r"\t.*|\s+[\d.]+\s*$")


def load_words(path: Path | None) -> list[str]:
    """A list of entities, answers or classes from a file; none without a file.

    Args:
        path: text with one a line (counts after the words are left out, where all lines have one), a JSON list, a
            JSON object of word to number (the authors' answers), or entities.json of `alpro shard`.

    Raises:
        ConfigError: it cannot be read as any of these, or has a word twice; capitals make no difference.
    """
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        words = _of_json(json.loads(text)) if path.suffix == ".json" else _of_lines(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no list of words: {error}") from error
    if wrong := [word for word in words if not isinstance(word, str) or not word.strip()]:
        raise ConfigError(f"{path} is no list of words: {wrong[0]!r} is in it")
    counts = Counter(map(same_text, words))
    if doubled := [word for word in words if counts[same_text(word)] > 1]:
        raise ConfigError(f"{path} has {doubled[0]!r} more than once: each is an output of the model; remove one")
    return words


def _of_json(values: Any) -> list[Any]:
    if isinstance(values, Mapping) and "entities" in values:
        return [row["word"] for row in values["entities"]]
    if isinstance(values, Mapping):
        if sorted(values.values()) != list(range(len(values))):
            raise ValueError(f"its numbers are not 0 to {len(values) - 1}, each once")
        return sorted(values, key=values.__getitem__)
    if not isinstance(values, list):
        raise TypeError(f"a {type(values).__name__}")
    return values


def _of_lines(text: str) -> list[str]:
    """A word a line; counts after them, as in the authors' file of entities, are left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if all(_COUNT.search(line) for line in lines):  # else a number is part of the words, as in "formula 1"
        lines = [_COUNT.sub("", line) for line in lines]
    return lines
