"""The order of samples, as a pure function of (seed, shard sizes, step).

::

    shards        |  0  |  1  |   2   | 3 |         a pass permutes the shards,
    permuted      |  2  | 3 |  0  |  1  |           takes windows of K shards (here 2)
    windows       [ 2 + 3   ][ 0 + 1    ]           and mixes the samples inside each window:
    canonical     ...........................       the canonical order of the pass
    lanes         | lane 0 | lane 1 | lane 2 |rest  contiguous parts; a rank owns some of the lanes

A global batch takes `lane_batch` samples from every lane, so it does not depend on the number of ranks.
What a pass counts are units: clips, or the captions or questions of clips (`alpro_stream.stream.units`).
Nothing here reads a file: the whole state of the order is the number of committed steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import isfinite, lcm
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alpro_stream.errors import PlanError
from alpro_stream.stream.seeds import random_order

# 3: the order of samples is that of 2; what is drawn for a sample changed.
PLAN_VERSION = 3
"""Raised with every change of the order or of the draws; part of the fingerprint of a run."""

Mix = Literal["sizes", "weights", "alternate"]


@dataclass(frozen=True, slots=True)
class SourceShape:
    """What the plan knows of a source: its name and the number of units in each shard."""

    name: str
    shard_sizes: tuple[int, ...]
    weight: float = 1.0

    @property
    def num_samples(self) -> int:
        """Units of one pass."""
        return sum(self.shard_sizes)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """One global batch, or some lanes of it: where each of its samples lies.

    Attributes:
        step: position in the run, from 0.
        source: index of the source all samples come from.
        pass_index: how often that source was passed through before.
        refs: (lanes, lane_batch, 2) int64: shard number in the source and unit in the shard.
    """

    step: int
    source: int
    pass_index: int
    refs: NDArray[np.int64]


class PassOrder:
    """The canonical order of one pass through one source; windows are mixed when they are first read.

    Args:
        shape: the source.
        window_shards: shards whose samples are mixed together.
        seed: of the run.
        pass_index: how often the source was passed through before.
        cached_windows: mixed windows that are kept; at least two for every lane that is read in turn.
    """

    def __init__(
        self, shape: SourceShape, window_shards: int, seed: int, pass_index: int, cached_windows: int = 64
    ) -> None:
        self._identity = (seed, shape.name, pass_index)
        self._shards = random_order(len(shape.shard_sizes), "shards", *self._identity)
        sizes = np.asarray(shape.shard_sizes, dtype=np.int64)[self._shards]
        # ends[i]: samples in the permuted shards 0..i-1.
        self._ends = np.concatenate([[0], np.cumsum(sizes)])
        firsts = np.arange(0, len(sizes) + window_shards, window_shards).clip(max=len(sizes))
        self._window_ends = self._ends[firsts]
        self._mixed = lru_cache(maxsize=cached_windows)(self._mix_window)

    def locate(self, start: int, stop: int) -> NDArray[np.int64]:
        """(shard, unit) of the positions start..stop-1 of the pass, as (stop - start, 2).

        Raises:
            IndexError: positions outside the pass.
        """
        if not 0 <= start <= stop <= self._ends[-1]:
            raise IndexError(f"positions {start} to {stop} of a pass of {self._ends[-1]} units")
        parts = [np.empty((0, 2), dtype=np.int64)]
        while start < stop:
            window = int(np.searchsorted(self._window_ends, start, side="right")) - 1
            begin, end = int(self._window_ends[window]), int(self._window_ends[window + 1])
            taken = min(stop, end)
            parts.append(self._mixed(window)[start - begin : taken - begin])
            start = taken
        return np.concatenate(parts)

    def _mix_window(self, window: int) -> NDArray[np.int64]:
        begin, end = int(self._window_ends[window]), int(self._window_ends[window + 1])
        positions = begin + random_order(end - begin, "window", *self._identity, window)
        permuted = np.searchsorted(self._ends, positions, side="right") - 1
        return np.stack([self._shards[permuted], positions - self._ends[permuted]], axis=1)


class Plan:
    """Which samples make up each global batch of a run.

    Args:
        sources: their names (part of the seed) and shard sizes.
        seed: of the whole run.
        global_batch: samples a step, over all ranks.
        num_lanes: parallel streams of the run; divides the global batch, is divided by the world size.
        window_shards: K, the shards whose samples are mixed together; a lane has about that many open.
        mix: which source a step takes: in proportion to their `sizes`, to their `weights`, or `alternate`.

    Raises:
        PlanError: lanes that do not divide the batch, fewer than two samples of a lane in a batch, or a
            source with less than one global batch (the largest that fits is named).
    """

    def __init__(
        self,
        sources: Sequence[SourceShape],
        *,
        seed: int,
        global_batch: int,
        num_lanes: int,
        window_shards: int,
        mix: Mix = "sizes",
    ) -> None:
        _check_lanes(global_batch, num_lanes)
        self.sources = tuple(sources)
        for source in self.sources:
            _check_size(source, global_batch, num_lanes)
        self.num_lanes = num_lanes
        self.lane_batch = global_batch // num_lanes
        self.steps_per_pass = tuple(source.num_samples // global_batch for source in self.sources)
        self.left_over = tuple(source.num_samples % global_batch for source in self.sources)
        self._seed = seed
        self._weights = _mix_weights(mix, self.sources, self.steps_per_pass)
        self._pass_order = lru_cache(maxsize=2 * len(self.sources))(
            lambda source, pass_index: PassOrder(
                self.sources[source], window_shards, seed, pass_index, cached_windows=2 * num_lanes
            )
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every source is passed through once (with `mix: sizes`; else as many steps)."""
        return sum(self.steps_per_pass)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the steps, that each source has in the long run."""
        total = sum(self._weights)
        return tuple(weight / total for weight in self._weights)

    def __getitem__(self, step: int) -> PlannedStep:
        """The global batch of a step; any step, in any order, at the same cost."""
        return self.part(step, range(self.num_lanes))

    def part(self, step: int, lanes: range) -> PlannedStep:
        """The samples that some lanes give to a step; costs nothing for the other lanes.

        Raises:
            IndexError: a step below 0.
        """
        source, pass_index, step_in_pass = self.place(step)
        order = self._pass_order(source, pass_index)
        starts = [self._position(source, step_in_pass, lane) for lane in lanes]
        refs = np.stack([order.locate(start, start + self.lane_batch) for start in starts])
        return PlannedStep(step, source, pass_index, refs)

    def place(self, step: int) -> tuple[int, int, int]:
        """Source of a step, the pass of that source, and the step inside the pass.

        Raises:
            IndexError: a step below 0.
        """
        if step < 0:
            raise IndexError(f"step {step}: the steps of a run count from 0")
        source, source_step = mixed_step(step, self._weights)
        return source, *divmod(source_step, self.steps_per_pass[source])

    def substitutes(self, step: int, lane: int, row: int) -> NDArray[np.int64]:
        """What may stand in for one sample of a step: the left-over of its pass, in an order drawn for its position.

        Args:
            step: position in the run.
            lane: number of the lane.
            row: place among the lane's samples of the step.

        Returns:
            (left_over, 2) int64: shard number in the source and unit in the shard.
        """
        source, pass_index, step_in_pass = self.place(step)
        left_over = self.left_over[source]
        position = self._position(source, step_in_pass, lane) + row
        total = self.sources[source].num_samples
        found = self._pass_order(source, pass_index).locate(total - left_over, total)
        name = self.sources[source].name
        return found[random_order(left_over, "substitute", self._seed, name, pass_index, position)]

    def _position(self, source: int, step_in_pass: int, lane: int) -> int:
        """Of the first sample that a lane gives to a step, in the canonical order of the pass."""
        return (lane * self.steps_per_pass[source] + step_in_pass) * self.lane_batch


def mixed_step(step: int, weights: Sequence[int]) -> tuple[int, int]:
    """Source of a step, and how many steps that source had before it.

    Source 0 gets its share evenly spread (``floor((step * w0 + W/2) / W)`` of the first `step` steps), the
    others share the rest in the same way: a pure function, and after W steps every source had exactly its
    weight.
    """
    for source in range(len(weights) - 1):
        weight, total = weights[source], sum(weights[source:])
        before = (step * weight + total // 2) // total
        if ((step + 1) * weight + total // 2) // total > before:
            return source, before
        step -= before
    return len(weights) - 1, step


def lanes_of_rank(rank: int, world_size: int, num_lanes: int) -> range:
    """The lanes a rank reads.

    Raises:
        PlanError: the world size does not divide the lanes; the sizes that do are listed.
    """
    if num_lanes % world_size:
        allowed = [size for size in range(1, num_lanes + 1) if num_lanes % size == 0]
        raise PlanError(
            f"{world_size} ranks do not divide the {num_lanes} lanes of this run; allowed numbers of ranks: "
            f"{', '.join(map(str, allowed))} (stream.num_lanes is fixed for a run)"
        )
    share = num_lanes // world_size
    return range(rank * share, (rank + 1) * share)


def _check_lanes(global_batch: int, num_lanes: int) -> None:
    if global_batch < 2:
        raise PlanError(f"stream.global_batch {global_batch}: contrastive losses need at least 2 samples")
    if global_batch % num_lanes:
        raise PlanError(
            f"stream.global_batch {global_batch} is not a multiple of stream.num_lanes {num_lanes}; "
            f"use for example {max(2, global_batch // num_lanes) * num_lanes}"
        )
    if global_batch // num_lanes < 2:
        fewer = max(lanes for lanes in range(1, global_batch // 2 + 1) if global_batch % lanes == 0)
        raise PlanError(
            f"stream.global_batch {global_batch} over {num_lanes} lanes leaves {global_batch // num_lanes} sample "
            f"a lane; VTM needs at least 2 to find a negative: use stream.num_lanes={fewer}"
        )


def _check_size(source: SourceShape, global_batch: int, num_lanes: int) -> None:
    if source.num_samples < global_batch:
        raise PlanError(
            f"source {source.name!r} has {source.num_samples} samples, less than one global batch of "
            f"{global_batch}: a pass would have no step; {_largest_batch(source.num_samples, num_lanes)}"
        )


def _largest_batch(num_samples: int, num_lanes: int) -> str:
    if num_samples >= 2 * num_lanes:
        return f"the largest batch that fits is stream.global_batch={num_samples // num_lanes * num_lanes}"
    if num_samples >= 2:
        return f"the largest batch that fits is stream.global_batch={num_samples} with stream.num_lanes=1"
    return "give it at least 2 samples, or leave it out (stream.sources=[{path: ..., kind: ...}])"


def _mix_weights(mix: Mix, sources: Sequence[SourceShape], steps_per_pass: Sequence[int]) -> tuple[int, ...]:
    if mix == "sizes":
        return tuple(steps_per_pass)
    if mix == "alternate":
        return (1,) * len(sources)
    for source in sources:
        if not (isfinite(source.weight) and source.weight > 0):
            raise PlanError(f"mix: weights needs a weight above 0; source {source.name!r} has {source.weight}")
    # By way of the decimals as they are written: 0.1 and 0.2 are 1 to 2, however small they are.
    fractions = [Fraction(repr(float(source.weight))) for source in sources]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * scale) for fraction in fractions)
