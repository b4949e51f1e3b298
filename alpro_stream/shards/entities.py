"""The entity vocabulary of a data set: nouns of its captions with their counts, the most frequent first."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from alpro_stream.errors import ShardError
from alpro_stream.manifest.places import is_address
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.remote_files import read_file
from alpro_stream.shards.storage import publish_bytes

ENTITIES_VERSION = 1

Entities = list[tuple[str, int]]


def merge_entities(lists: Iterable[Iterable[tuple[str, int]]], limit: int | None = None) -> Entities:
    """Adds up counts; the most frequent first, ties by the alphabet, so the order of the lists does not matter."""
    total: Counter[str] = Counter()
    for entities in lists:
        for word, count in entities:
            total[word] += count
    return sorted(total.items(), key=lambda entity: (-entity[1], entity[0]))[:limit]


def save_entities(path: str | Path, entities: Sequence[tuple[str, int]]) -> None:
    """Writes ``entities.json`` atomically."""
    rows = [{"word": word, "count": count} for word, count in entities]
    text = json.dumps({"format_version": ENTITIES_VERSION, "entities": rows}, indent=1, ensure_ascii=False) + "\n"
    publish_bytes(Path(path), text.encode("utf-8"))


def load_entities(path: str | Path, fetch: FetchConfig | None = None) -> Entities:
    """Reads ``entities.json``.

    Args:
        path: a file, or its address.
        fetch: how to fetch what is behind an address.

    Raises:
        ShardError: it is missing, damaged or of another version.
    """
    if not is_address(str(path)) and not Path(path).exists():
        raise ShardError(f"no such entity list: {path}; `alpro shard` writes one into each split's folder")
    try:
        values = json.loads(read_file(str(path), fetch or FetchConfig()).decode("utf-8"))
        if values["format_version"] != ENTITIES_VERSION:
            raise ShardError(f"{path}: format version {values['format_version']!r}, expected {ENTITIES_VERSION}")
        return [(str(row["word"]), int(row["count"])) for row in values["entities"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not an entity list: {error!r}") from error
