"""How well an order mixes: figures of a plan, with what chance alone would give, and what each of them means.

Two orders that only differ in their settings can be told apart here before a run is spent on the worse one: neighbours
that stay neighbours from pass to pass, and batches whose samples come from few shards or few source videos, give a
contrastive loss the same easy negatives again and again.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.manifest import Kind
from alpro_stream.stream.plan import PassOrder, Plan, SourceShape, lanes_of_rank
from alpro_stream.stream.sources import MOST_OPEN_SHARDS, Place
from alpro_stream.stream.units import Unit

LARGEST_BATCH, MOST_LANES = 256, 16
"""Taken where nothing is said: those of the published runs."""
MANY_STEPS = 100
"""Steps over which the files that a rank touches are counted beside those of one step."""
_BLOCK, _IN_A_ROW = 1 << 16, 5
# Small data sets give few pairs a pass: more passes are compared until there are about so many.
_ENOUGH_PAIRS, _MOST_PASSES = 100_000, 50
# What still counts as well mixed. Chance may be doubled, as figures of small data sets vary about that much.
_KEPT_MORE, _SHARD_MORE, _MASKED, _LEFT_OVER = 0.001, 0.02, 0.01, 0.05


class MixingConfig(Config):
    """The settings of an order that is measured, as in `stream` of a run."""

    global_batch: int | None = Field(default=None, ge=2)
    """Samples of a step over all ranks; null takes the largest that fits, up to 256."""
    num_lanes: int | None = Field(default=None, ge=1)
    """Parallel streams; null takes 16, or the most that the batch allows."""
    window_shards: int = Field(default=8, ge=1)
    """Shards whose samples are mixed together."""
    seed: int = 42
    """Seed of the order."""
    ranks: int = Field(default=1, ge=1)
    """Processes the lanes are shared by; decides how many files each of them has open."""
    unit: Unit = "clip"
    """What a pass counts."""
    kind: Kind | None = None
    """As of the source in the run: which shards."""
    name: str = ""
    """As of the source in the run: part of every draw, and so of the order."""
    exclude: Place | None = None
    """As of the source in the run: file with the keys that are not used."""
    num_batches: int = Field(default=50, ge=1)
    """Batches looked at, spread over a pass."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of pairs.

    Attributes:
        found: in this order.
        chance: in an order without any structure, on average.
        num_pairs: pairs looked at.
    """

    found: float
    chance: float
    num_pairs: int


def fitting_batch(num_units: int, global_batch: int | None, num_lanes: int | None) -> tuple[int, int]:
    """Global batch and lanes, where one or both are left to be chosen.

    Args:
        num_units: units of a pass.
        global_batch: samples of a step; None for the largest that fits, up to 256.
        num_lanes: of the run; None for 16, or the most that the batch allows.

    Returns:
        both; they may be impossible (data of one sample, a given batch that does not fit), which `Plan` refuses.
    """
    if global_batch is None:
        lanes = num_lanes or max(1, min(MOST_LANES, num_units // 2))
        return max(min(LARGEST_BATCH, num_units) // lanes, 2) * lanes, lanes
    if num_lanes is None:
        # VTM needs two samples in a lane.
        most = min(MOST_LANES, global_batch // 2)
        num_lanes = max(lanes for lanes in range(1, most + 1) if global_batch % lanes == 0)
    return global_batch, num_lanes


def spread_steps(num_steps: int, count: int) -> list[int]:
    """At most `count` steps of a pass: a few in a row, which read the same shards, at places evenly spread."""
    if num_steps <= count:
        return list(range(num_steps))
    firsts = np.linspace(0, max(0, num_steps - _IN_A_ROW), -(-count // _IN_A_ROW)).astype(int)
    return sorted({int(first) + further for first in firsts for further in range(_IN_A_ROW)})[:count]


def kept_neighbours(before: NDArray[np.integer[Any]], after: NDArray[np.integer[Any]]) -> int:
    """How many adjacent pairs of one order are adjacent in another one.

    Args:
        before: (N,) a permutation of the numbers below N.
        after: (N,) another one.
    """
    places = np.empty_like(after)
    places[after] = np.arange(len(after), dtype=after.dtype)
    kept = 0
    for start in range(0, len(before) - 1, _BLOCK):  # block by block: these arrays are large enough as they are
        found = places[before[start : start + _BLOCK + 1]].astype(np.int64)
        kept += int(np.count_nonzero(np.abs(np.diff(found)) == 1))
    return kept


def neighbours(shape: SourceShape, window_shards: int, seed: int) -> tuple[Share, int]:
    """The share of neighbours of a pass that are neighbours in the next pass too, over whole passes.

    Args:
        shape: of the source.
        window_shards: shards whose samples are mixed together.
        seed: of the order.

    Returns:
        the share, and how many pairs of successive passes it is an average of.
    """
    total = shape.num_samples
    num_passes = int(np.clip(_ENOUGH_PAIRS // total, 1, _MOST_PASSES))
    kept, before = 0, _numbers(shape, window_shards, seed, 0)
    for pass_index in range(1, num_passes + 1):
        after = _numbers(shape, window_shards, seed, pass_index)
        kept += kept_neighbours(before, after)
        before = after
    num_pairs = num_passes * (total - 1)
    return Share(kept / max(1, num_pairs), min(1.0, 2 / total), num_pairs), num_passes


def same_shard(plan: Plan, steps: Sequence[int]) -> Share:
    """The share of pairs in a global batch that come from the same shard.

    Args:
        plan: of one source.
        steps: steps that are looked at.
    """
    pairs = sum(equal_pairs(plan[step].refs[..., 0].ravel().tolist()) for step in steps)
    batch = plan.num_lanes * plan.lane_batch
    num_pairs = len(steps) * _pairs(batch)
    (source,) = plan.sources
    chance = sum(_pairs(size) for size in source.shard_sizes) / max(1, _pairs(source.num_samples))
    return Share(pairs / num_pairs, chance, num_pairs)


def equal_pairs(names: Iterable[Hashable]) -> int:
    """How many pairs are equal: those that a loss masks out, where the names are the videos' or the texts'."""
    return sum(_pairs(count) for count in Counter(names).values())


def files_touched(plan: Plan, ranks: int, first: int, count: int) -> int:
    """Distinct shards that a rank reads in `count` steps from `first` on; of the rank that reads the most."""
    steps = [plan[step].refs[..., 0] for step in range(first, first + count)]
    owned = [lanes_of_rank(rank, ranks, plan.num_lanes) for rank in range(ranks)]
    return max(len(np.unique(np.stack([shards[lanes.start : lanes.stop] for shards in steps]))) for lanes in owned)


def judge_neighbours(share: Share, window_shards: int, num_shards: int) -> str:
    """What the share of kept neighbours means, in a sentence."""
    if share.found <= 2 * share.chance + _KEPT_MORE:
        return "mixes well from pass to pass"
    return f"neighbours stay together from pass to pass; raise {_window(window_shards, num_shards)}"


def judge_same_shard(share: Share, window_shards: int, num_shards: int) -> str:
    """What the share of pairs from the same shard means, in a sentence."""
    if share.found <= 2 * share.chance + _SHARD_MORE:
        return "mixes well inside a batch"
    return f"batches are made of few shards; raise {_window(window_shards, num_shards)} or num_lanes"


def judge_masked(share: float, what: str, remedy: str) -> str:
    """What the pairs that are masked out of the negatives mean, in a sentence.

    Args:
        share: of all pairs of a batch.
        what: the thing that is the same in both, such as ``text``.
        remedy: what makes them fewer.
    """
    if share <= _MASKED:
        return f"few pairs of the same {what} in a batch, and they are masked out of the negatives"
    return f"{100 * share:.2g} % of the negatives of a batch are masked out as of the same {what}; {remedy}"


def judge_files(in_a_step: int) -> str:
    """What the files that one step of a rank reads mean, in a sentence.

    Args:
        in_a_step: shards that a rank reads in one step.
    """
    if in_a_step <= MOST_OPEN_SHARDS:
        return f"a rank keeps them open from step to step (up to {MOST_OPEN_SHARDS} of all data sets)"
    return (
        f"more than the {MOST_OPEN_SHARDS} files that a rank keeps open, so they are opened again in every step; use "
        "more ranks, fewer num_lanes or a smaller window_shards"
    )


def judge_left_over(left_over: int, num_units: int) -> str:
    """What the samples left over in a pass mean, in a sentence."""
    if left_over <= _LEFT_OVER * num_units:
        return "few samples are left out of a pass, and other ones each time"
    return "many samples are left out of a pass, though other ones each time; use a smaller global_batch"


def _numbers(shape: SourceShape, window_shards: int, seed: int, pass_index: int) -> NDArray[np.integer[Any]]:
    """The canonical order of a pass, each unit by its number in the source; block by block, as refs take 16 bytes."""
    order = PassOrder(shape, window_shards, seed, pass_index)
    sizes = np.asarray(shape.shard_sizes, dtype=np.int64)
    firsts = np.cumsum(sizes) - sizes
    numbers = np.empty(shape.num_samples, dtype=np.min_scalar_type(shape.num_samples))
    for start in range(0, len(numbers), _BLOCK):
        refs = order.locate(start, min(start + _BLOCK, len(numbers)))
        numbers[start : start + len(refs)] = firsts[refs[:, 0]] + refs[:, 1]
    return numbers


def _window(window_shards: int, num_shards: int) -> str:
    return f"window_shards (now {window_shards} of {num_shards} shards)"


def _pairs(count: int) -> int:
    return count * (count - 1) // 2
