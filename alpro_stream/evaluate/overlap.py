"""Samples that are there twice: in two data sets of an evaluation, or in its data and in those of the training."""

import logging
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from alpro_stream.config import read_config
from alpro_stream.errors import AlproError, ConfigError, DataError
from alpro_stream.evaluate.embed import StoredClip
from alpro_stream.manifest.places import is_address
from alpro_stream.stream.sources import Source, SourceConfig, open_sources

logger = logging.getLogger(__name__)

_RUN_CONFIG = "config.yaml"


def check_each_once(clips: Sequence[StoredClip]) -> None:
    """Refuses a key that is there twice: a copy of the right answer would count as a wrong one.

    Raises:
        DataError: names the first one, and where it lies.
    """
    first: dict[str, StoredClip] = {}
    twice = [(first[clip.key], clip) for clip in clips if first.setdefault(clip.key, clip) is not clip]
    if twice:
        one, other = twice[0]
        places = " and in ".join(f"{clip.source.reader.place} ({clip.shard})" for clip in (one, other))
        raise DataError(
            f"{len(twice)} of {len(clips)} samples are there twice, such as {one.key} in {places}: a copy of the right "
            "video would count as a wrong one. Name each data set once in sources, or list such keys in its exclude"
        )


def num_trained_on(keys: Set[str], checkpoint: Path) -> int | None:
    """How many of the keys are in the data sets of the run that wrote a checkpoint; not of those it started from.

    Args:
        keys: of the samples that are evaluated.
        checkpoint: its folder.

    Returns:
        None where it is not known: an exported model does not say, or the data sets are elsewhere or behind addresses.
    """
    if not (checkpoint / _RUN_CONFIG).is_file():
        return None
    try:
        stream = read_config(checkpoint / _RUN_CONFIG)["stream"]
        return num_shared(keys, [SourceConfig.model_validate(source) for source in stream["sources"]])
    except (ConfigError, ValidationError, KeyError, TypeError):
        return None


def num_shared(keys: Set[str], configs: Sequence[SourceConfig]) -> int | None:
    """How many of the keys some data sets have; reads their indexes, a second for some two million members.

    Returns:
        None where one cannot be read, or lies behind an address: its indexes would all be fetched.
    """
    if any(is_address(config.path) for config in configs):
        return None
    with ExitStack() as stack:
        try:
            sources = open_sources(configs)
            for source in sources:
                stack.callback(source.reader.close)
            return len({key for source in sources for key in keys_of(source) if key in keys})
        except (AlproError, OSError) as error:
            logger.info("no look at what was trained on: %s", error)
            return None


def keys_of(source: Source) -> Iterator[str]:
    """Keys of the samples that are used, from the indexes of the shards."""
    for shard in source.shards:
        excluded = source.listing.excluded.get(shard.name, ())
        yield from (key for slot, key in enumerate(source.reader.index(shard.name).keys()) if slot not in excluded)
