"""`alpro inspect DATASET --shuffle`: how well a data set would be mixed, in figures and a sentence each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpro_stream.errors import SampleError
from alpro_stream.stream.mixing import (
    MANY_STEPS,
    MixingConfig,
    Share,
    equal_pairs,
    files_touched,
    fitting_batch,
    judge_files,
    judge_left_over,
    judge_masked,
    judge_neighbours,
    judge_same_shard,
    neighbours,
    same_shard,
    spread_steps,
)
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.sources import MOST_OPEN_SHARDS, Source, SourceConfig, Storage, open_sources
from alpro_stream.stream.units import same_text, same_video, text_number, texts_of


def shuffle_view(path: Path, config: MixingConfig) -> dict[str, Any]:
    """The order that these settings give, measured for each kind of sample of a data set.

    Args:
        path: folder of a split.
        config: settings of the order.

    Raises:
        PlanError: settings that no order can be made of.
        ShardError: the data set, or a shard of it, cannot be read.
    """
    data = SourceConfig(path=str(path), kind=config.kind, name=config.name, exclude=config.exclude)
    sources = open_sources([data], config.unit, Storage(max_open=MOST_OPEN_SHARDS))
    try:
        return {
            "dataset": str(path),
            "digest": sources[0].reader.info.digest,
            "settings": config.model_dump(mode="json", exclude={"global_batch", "num_lanes"}),
            "sources": [_source_view(source, config) for source in sources],
        }
    finally:
        for source in sources:
            source.reader.close()


def _source_view(source: Source, config: MixingConfig) -> dict[str, Any]:
    shape, window = source.shape, config.window_shards
    num_shards = len(shape.shard_sizes)
    batch, lanes = fitting_batch(shape.num_samples, config.global_batch, config.num_lanes)
    plan = Plan([shape], seed=config.seed, global_batch=batch, num_lanes=lanes, window_shards=window)
    num_steps, left_over = plan.steps_per_pass[0], plan.left_over[0]
    steps = spread_steps(num_steps, config.num_batches)
    kept, num_passes = neighbours(shape, window, config.seed)
    together = same_shard(plan, steps)
    return {
        "name": source.name,
        "num_units": shape.num_samples,
        "num_shards": num_shards,
        "global_batch": batch,
        "num_lanes": lanes,
        "steps_per_pass": num_steps,
        "neighbours_kept": {
            **_figures(kept),
            "passes_compared": num_passes,
            "verdict": judge_neighbours(kept, window, num_shards),
        },
        "same_shard_in_a_batch": {
            **_figures(together),
            "batches": len(steps),
            "verdict": judge_same_shard(together, window, num_shards),
        },
        **_sample_views(source, config, plan, steps),
        "files_a_rank": _files(plan, config.ranks, steps),
        "left_over_a_pass": {
            "num": left_over,
            "percent": round(100 * left_over / shape.num_samples, 3),
            "verdict": judge_left_over(left_over, shape.num_samples),
        },
    }


def _figures(share: Share) -> dict[str, Any]:
    return {"share": share.found, "by_chance": share.chance, "pairs": share.num_pairs}


def _files(plan: Plan, ranks: int, steps: Sequence[int]) -> dict[str, Any]:
    in_a_step = max(files_touched(plan, ranks, step, 1) for step in steps)
    many = min(MANY_STEPS, plan.steps_per_pass[0])
    last = plan.steps_per_pass[0] - many
    in_many = max(files_touched(plan, ranks, first, many) for first in {0, last // 2, last})
    return {
        "ranks": ranks,
        "in_a_step": in_a_step,
        f"in_{MANY_STEPS}_steps": in_many,
        "verdict": judge_files(in_a_step),
    }


def _sample_views(source: Source, config: MixingConfig, plan: Plan, steps: Sequence[int]) -> dict[str, Any]:
    """Pairs that a loss masks out, which only the samples themselves tell."""
    videos, texts, num_left_out = [], [], 0
    for step in steps:
        found = list(_names(source, plan[step].refs.reshape(-1, 2), config.seed))
        num_left_out += plan.num_lanes * plan.lane_batch - len(found)
        videos.append(equal_pairs(video for video, _ in found))
        texts.append(equal_pairs(text for _, text in found))
    seen = {"batches": len(steps), "unreadable_samples": num_left_out}
    batch = plan.num_lanes * plan.lane_batch
    remedies = {"source video": "raise window_shards", "text": "captions that are repeated teach little: remove some"}
    return {
        name: {
            "pairs_mean": float(np.mean(pairs)),
            "pairs_largest": max(pairs),
            **seen,
            "verdict": judge_masked(float(np.mean(pairs)) / (batch * (batch - 1) / 2), what, remedies[what]),
        }
        for name, pairs, what in (
            ("same_video_in_a_batch", videos, "source video"),
            ("same_text_in_a_batch", texts, "text"),
        )
    }


def _names(source: Source, refs: NDArray[np.int64], seed: int) -> Iterator[tuple[str, str]]:
    """What the source video and the text of each unit of a batch are known by; damaged samples are left out."""
    for shard, unit in refs.tolist():
        try:
            slot, number = source.locate(shard, unit)
            metadata = source.reader.metadata(source.shards[shard].name, slot)
        except SampleError:
            continue
        texts = texts_of(source.unit, metadata)
        if texts:
            chosen = text_number(number, len(texts), (seed, source.name, 0, metadata.key))
            yield same_video(metadata), same_text(texts[chosen])
