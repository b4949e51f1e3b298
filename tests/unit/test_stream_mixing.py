"""Figures of mixing: bad orders look bad, and what runs use by default looks well."""

import numpy as np
import pytest

from alpro_stream.stream.mixing import (
    equal_pairs,
    files_touched,
    fitting_batch,
    judge_files,
    judge_left_over,
    judge_masked,
    judge_neighbours,
    judge_same_shard,
    kept_neighbours,
    neighbours,
    same_shard,
    spread_steps,
)
from alpro_stream.stream.plan import Plan, SourceShape

LARGE = SourceShape("video", (100,) * 200)
SMALL = SourceShape("video", (10, 10, 10))  # 30 clips


def plan_of(shape, window_shards, **changes):
    values = {"seed": 1, "global_batch": 256, "num_lanes": 16, **changes}
    return Plan([shape], window_shards=window_shards, **values)


def steps_of(plan):
    return spread_steps(plan.steps_per_pass[0], 50)


def test_orders_that_keep_their_neighbours_are_seen():
    order = np.random.default_rng(1).permutation(1000)
    assert kept_neighbours(order, order) == 999
    assert kept_neighbours(order, order[::-1].copy()) == 999
    assert kept_neighbours(order, np.roll(order, 300)) == 998
    blocks = np.concatenate(np.random.default_rng(2).permutation(order.reshape(-1, 10)))
    assert 900 <= kept_neighbours(order, blocks) <= 910  # shards permuted, not mixed
    assert kept_neighbours(order, np.random.default_rng(3).permutation(1000)) <= 10
    long = np.arange(200_000)
    assert kept_neighbours(long, long) == 199_999


def test_neighbours_do_not_stay_together_from_pass_to_pass():
    share, _ = neighbours(LARGE, window_shards=8, seed=1)
    assert share.found < 0.001
    assert judge_neighbours(share, 8, 200) == "mixes well from pass to pass"
    # Each shard for itself: its 100 samples are only ever beside each other.
    alone, num_passes = neighbours(LARGE, window_shards=1, seed=1)
    assert alone.found == pytest.approx(0.02, rel=0.2)
    assert alone.chance == pytest.approx(0.0001)
    assert (num_passes, alone.num_pairs) == (5, 5 * 19_999)
    assert "raise window_shards (now 1 of 200 shards)" in judge_neighbours(alone, 1, 200)


def test_thirty_clips_mix_as_well_as_chance_allows():
    share, num_passes = neighbours(SMALL, window_shards=8, seed=1)
    assert num_passes == 50
    assert share.found == pytest.approx(share.chance, rel=0.3)
    assert judge_neighbours(share, 8, 3) == "mixes well from pass to pass"
    assert "raise window_shards" in judge_neighbours(neighbours(SMALL, 1, seed=1)[0], 1, 3)


def test_a_batch_of_few_shards_is_seen():
    plan = plan_of(LARGE, window_shards=8)
    share = same_shard(plan, steps_of(plan))
    assert share.found < 0.02
    assert share.chance == pytest.approx(0.005, rel=0.02)
    assert judge_same_shard(share, 8, 200) == "mixes well inside a batch"
    # 16 lanes, each with its 16 samples out of one shard: 15 companions of 255.
    plan = plan_of(LARGE, window_shards=1)
    share = same_shard(plan, steps_of(plan))
    assert share.found == pytest.approx(15 / 255, rel=0.2)
    assert "raise window_shards (now 1 of 200 shards) or num_lanes" in judge_same_shard(share, 1, 200)
    # Sorted shards read one after the other: the worst there is.
    plan = plan_of(LARGE, window_shards=1, global_batch=100, num_lanes=1)
    assert same_shard(plan, steps_of(plan)).found == 1


def test_equal_pairs():
    assert equal_pairs("abc") == 0
    assert equal_pairs("aabbb") == 1 + 3
    assert equal_pairs([]) == 0


def test_files_of_a_rank_are_bounded_by_window_and_lanes():
    plan = plan_of(LARGE, window_shards=2)
    one, rank = files_touched(plan, 1, 5, 1), files_touched(plan, 16, 5, 1)
    assert 16 < one <= 3 * 16
    assert rank <= 4  # one lane: its window, and the next where it ends inside the batch
    assert rank < files_touched(plan, 16, 5, 70) <= 2 * (16 * 70 // 200 + 2)
    assert "keeps them open" in judge_files(one)
    assert "more ranks" in judge_files(600)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ((10_000, None, None), (256, 16)),
        ((256, None, None), (256, 16)),
        ((100, None, None), (96, 16)),
        ((30, None, None), (30, 15)),
        ((2, None, None), (2, 1)),
        ((1, None, None), (2, 1)),  # refused by `Plan`
        ((10_000, 100, None), (100, 10)),
        ((10_000, 2, None), (2, 1)),
        ((10_000, 7, None), (7, 1)),
        ((10_000, None, 6), (252, 6)),
        ((10_000, 64, 32), (64, 32)),
    ],
)
def test_batch_and_lanes_that_fit(given, chosen):
    assert fitting_batch(*given) == chosen
    if given[0] > 1:
        plan_of(SourceShape("video", (given[0],)), 8, global_batch=chosen[0], num_lanes=chosen[1])


def test_steps_are_spread_over_a_pass():
    assert spread_steps(1000, 15) == [0, 1, 2, 3, 4, 497, 498, 499, 500, 501, 995, 996, 997, 998, 999]
    assert spread_steps(7, 6) == [0, 1, 2, 3, 4, 5]
    assert spread_steps(3, 2) == [0, 1]
    assert spread_steps(3, 50) == [0, 1, 2]
    assert spread_steps(1, 50) == [0]


def test_what_is_masked_or_left_over_is_judged():
    assert judge_masked(0.005, "text", "x").startswith("few pairs of the same text")
    assert judge_masked(0.25, "text", "do this") == (
        "25 % of the negatives of a batch are masked out as of the same text; do this"
    )
    assert "few" in judge_left_over(10, 1000)
    assert "smaller global_batch" in judge_left_over(250, 1000)
