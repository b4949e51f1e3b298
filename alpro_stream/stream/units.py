"""What a pass counts: clips, or the captions or questions of clips; excluded samples left out.

The plan numbers the units of a shard from 0 and knows no more of them; here a number becomes a slot of the shard and,
for captions and questions, which of that sample's.
"""

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alpro_stream.shards.sample import SampleMetadata
from alpro_stream.stream.seeds import Draws

Unit = Literal["clip", "caption", "question"]
COUNTED: dict[Unit, int] = {"caption": 0, "question": 1}
"""Columns of `ShardReader.counts`."""


def clip_units(num_samples: int, excluded: Collection[int]) -> NDArray[np.int64]:
    """Slot of each unit, where a unit is a sample: all of them but the excluded ones, in order."""
    keeps = np.ones(num_samples, dtype=bool)
    keeps[list(excluded)] = False
    return np.flatnonzero(keeps)


def text_units(counts: NDArray[np.int64], excluded: Collection[int]) -> NDArray[np.int64]:
    """Slot and number of each unit, where a unit is a text of a sample, as (units, 2).

    Args:
        counts: texts of each slot.
        excluded: slots that give none.
    """
    counts = counts.copy()
    counts[list(excluded)] = 0
    slots = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return np.stack([slots, np.arange(len(slots)) - firsts[slots]], axis=1)


def texts_of(unit: Unit, metadata: SampleMetadata) -> tuple[str, ...]:
    """The texts of a sample that a pass may take: its captions, or its questions."""
    return tuple(pair.question for pair in metadata.qa) if unit == "question" else metadata.captions


def text_number(number: int | None, num_texts: int, identity: tuple[int | str, ...]) -> int:
    """Which of a sample's texts a unit has: its own, or where a unit is a clip, one drawn for it and the pass."""
    if number is None:
        return 0 if num_texts == 1 else Draws("caption", *identity).integer(num_texts)
    return number


def same_text(text: str) -> str:
    """What equal texts have in common: they are no negatives of each other."""
    return text.casefold().strip()


def same_video(metadata: SampleMetadata) -> str:
    """What samples of one video have in common: parts of one file, or copies of it, are no negatives of each other."""
    return str(metadata.source.get("sha256") or metadata.source.get("media") or metadata.key)
