from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.errors import PlanError
from alpro_stream.stream.plan import PLAN_VERSION, PassOrder, Plan, SourceShape, lanes_of_rank, mixed_step

SIZES = (5, 0, 7, 1, 4, 6, 1, 0)


def make_plan(sizes=SIZES, name="video", **changes):
    options = {"seed": 1, "global_batch": 4, "num_lanes": 2, "window_shards": 3, **changes}
    return Plan([SourceShape(name, tuple(sizes))], **options)


@st.composite
def plans(draw):
    """Any vector of shard sizes that holds at least one global batch, any allowed lanes, batch and window."""
    num_lanes, lane_batch = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(2, 4))
    global_batch = num_lanes * lane_batch
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 17, 30]), max_size=12))
    if sum(sizes) < global_batch:
        sizes.insert(draw(st.integers(0, len(sizes))), global_batch - sum(sizes) + draw(st.integers(0, 3)))
    window, seed = draw(st.integers(1, 15)), draw(st.integers(0, 100))
    return make_plan(sizes, seed=seed, global_batch=global_batch, num_lanes=num_lanes, window_shards=window)


@st.composite
def mixtures(draw):
    """Makes the same plan again and again, as each rank does: one to four sources, mixed in any way."""
    num_lanes, lane_batch = draw(st.sampled_from([1, 2, 4, 6, 8])), draw(st.integers(2, 3))
    global_batch = num_lanes * lane_batch
    sources = []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        sizes = draw(st.lists(st.sampled_from([0, 1, 3, 8, 21]), max_size=8))
        missing = max(0, global_batch - sum(sizes))
        weight = draw(st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.5]))
        sources.append(SourceShape(name, (*sizes, missing + draw(st.integers(0, 3))), weight))
    options = {
        "window_shards": draw(st.integers(1, 9)),
        "mix": draw(st.sampled_from(["sizes", "weights", "alternate"])),
    }
    seed = draw(st.integers(0, 100))
    return partial(Plan, tuple(sources), seed=seed, global_batch=global_batch, num_lanes=num_lanes, **options)


def divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]


def read_by_ranks(make, world_size, steps):
    """What each of the ranks reads, each with a plan of its own: (rank, step) -> refs."""
    plans = [make() for _ in range(world_size)]
    return {
        (rank, step): plan.part(step, lanes_of_rank(rank, world_size, plan.num_lanes))
        for rank, plan in enumerate(plans)
        for step in steps
    }


def pairs(refs):
    return [tuple(pair) for pair in np.asarray(refs).reshape(-1, 2).tolist()]


def of_pass(plan, pass_index):
    num_steps = plan.steps_per_pass[0]
    return [plan[step] for step in range(pass_index * num_steps, (pass_index + 1) * num_steps)]


@given(plan=plans(), pass_index=st.integers(0, 3))
def test_a_pass_takes_every_sample_once_but_the_left_over(plan, pass_index):
    (source,) = plan.sources
    global_batch = plan.num_lanes * plan.lane_batch
    steps = of_pass(plan, pass_index)
    assert len(steps) == source.num_samples // global_batch
    assert plan.left_over == (source.num_samples - len(steps) * global_batch,)
    assert plan.left_over[0] < global_batch
    assert {step.pass_index for step in steps} == {pass_index}
    assert {step.refs.shape for step in steps} == {(plan.num_lanes, plan.lane_batch, 2)}
    taken = [pair for step in steps for pair in pairs(step.refs)]
    stored = {(shard, slot) for shard, size in enumerate(source.shard_sizes) for slot in range(size)}
    assert len(taken) == len(set(taken)) == len(steps) * global_batch
    assert set(taken) <= stored


@given(plan=plans(), step=st.integers(0, 30))
def test_every_allowed_world_size_has_the_same_global_batches(plan, step):
    whole = plan[step].refs
    for world_size in range(1, plan.num_lanes + 1):
        if plan.num_lanes % world_size:
            with pytest.raises(PlanError):
                lanes_of_rank(0, world_size, plan.num_lanes)
            continue
        parts = [plan.part(step, lanes_of_rank(rank, world_size, plan.num_lanes)).refs for rank in range(world_size)]
        assert len({part.shape for part in parts}) == 1
        assert np.array_equal(np.concatenate(parts), whole)


@given(make=mixtures())
def test_each_source_gives_every_sample_once_a_pass_however_they_are_mixed(make):
    plan = make()
    global_batch = plan.num_lanes * plan.lane_batch
    taken, passes = defaultdict(list), defaultdict(list)
    for step in (plan[number] for number in range(2 * plan.steps_per_epoch + 7)):
        taken[step.source, step.pass_index] += pairs(step.refs)
        passes[step.source].append(step.pass_index)
    for source, seen in passes.items():
        shape, num_steps = plan.sources[source], plan.steps_per_pass[source]
        # One pass after the other, each with all of its steps; the last may not have ended yet.
        assert seen == [number // num_steps for number in range(len(seen))]
        stored = {(shard, unit) for shard, size in enumerate(shape.shard_sizes) for unit in range(size)}
        for pass_index in range(len(seen) // num_steps):
            found = taken[source, pass_index]
            assert len(found) == len(set(found)) == num_steps * global_batch
            assert len(stored - set(found)) == plan.left_over[source] == shape.num_samples - len(found)
        assert len(set(taken[source, seen[-1]])) == len(taken[source, seen[-1]])
        assert set(taken[source, seen[-1]]) <= stored


@given(make=mixtures(), data=st.data())
def test_ranks_have_equal_steps_and_share_no_sample(make, data):
    plan = make()
    world_size = data.draw(st.sampled_from(divisors(plan.num_lanes)))
    steps = range(plan.steps_per_epoch)
    parts = read_by_ranks(make, world_size, steps)
    per_rank = plan.num_lanes * plan.lane_batch // world_size
    seen = defaultdict(set)
    for step in steps:
        of_step = [parts[rank, step] for rank in range(world_size)]
        assert {(part.source, part.pass_index, part.refs.size // 2) for part in of_step} == {
            (plan[step].source, plan[step].pass_index, per_rank)
        }
        assert np.array_equal(np.concatenate([part.refs for part in of_step]), plan[step].refs)
        for rank, part in enumerate(of_step):
            seen[part.source, part.pass_index, rank].update(pairs(part.refs))
    for source, pass_index in {place[:2] for place in seen}:
        sets = [seen[source, pass_index, rank] for rank in range(world_size)]
        assert sum(map(len, sets)) == len(set().union(*sets))


@given(make=mixtures(), data=st.data())
def test_other_ranks_go_on_where_the_first_ones_stopped(make, data):
    """Twice, at any step: nothing is read twice, nothing is left out, and each global batch is what it was."""
    plan = make()
    steps = range(plan.steps_per_epoch + 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, steps.stop), min_size=2, max_size=2)))
    sizes = [data.draw(st.sampled_from(divisors(plan.num_lanes))) for _ in range(3)]
    batches = []
    for world_size, first, stop in zip(sizes, [0, *cuts], [*cuts, steps.stop], strict=True):
        parts = read_by_ranks(make, world_size, range(first, stop))
        for step in range(first, stop):
            batches.append(np.concatenate([parts[rank, step].refs for rank in range(world_size)]))
    assert len(batches) == len(steps)
    assert all(np.array_equal(batch, plan[step].refs) for step, batch in enumerate(batches))
    read = Counter((plan.place(step)[:2], pair) for step, batch in enumerate(batches) for pair in pairs(batch))
    assert set(read.values()) == {1}


@given(make=mixtures())
def test_each_source_has_its_share_at_every_step(make):
    plan, mix = make(), make.keywords["mix"]
    weights = {
        "sizes": plan.steps_per_pass,
        "weights": [source.weight for source in plan.sources],
        "alternate": [1] * len(plan.sources),
    }[mix]
    shares = np.array(weights) / sum(weights)
    taken = np.zeros(len(shares))
    for number in range(3 * plan.steps_per_epoch):
        taken[plan.place(number)[0]] += 1
        # Half a step for each division into one source and the others, see `mixed_step`.
        assert np.abs(taken - shares * (number + 1)).max() <= len(shares) / 2 + 1e-6
    if mix == "sizes":
        assert taken.tolist() == [3 * num_steps for num_steps in plan.steps_per_pass]


@given(make=mixtures(), data=st.data())
def test_substitutes_are_the_left_over_of_the_pass(make, data):
    plan = make()
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    lane, row = data.draw(st.integers(0, plan.num_lanes - 1)), data.draw(st.integers(0, plan.lane_batch - 1))
    found = plan.substitutes(step, lane, row)
    source, pass_index, _ = plan.place(step)
    shape, num_steps = plan.sources[source], plan.steps_per_pass[source]
    assert found.dtype == np.int64
    assert found.shape == (plan.left_over[source], 2)
    # Planned ones of the same pass, read without a mixture that would put other sources between them.
    order = plan._pass_order(source, pass_index)
    planned = pairs(order.locate(0, num_steps * plan.num_lanes * plan.lane_batch))
    stored = [(shard, unit) for shard, size in enumerate(shape.shard_sizes) for unit in range(size)]
    assert sorted(pairs(found) + planned) == stored
    # A rank that is asked for the first time, after other positions or on its own, says the same.
    other = make()
    other.substitutes(step, plan.num_lanes - 1 - lane, 0)
    assert np.array_equal(other.substitutes(step, lane, row), found)
    assert np.array_equal(plan.substitutes(step, lane, row), found)


def test_each_position_has_substitutes_of_its_own():
    """Else a burst of damaged samples would repeat one clip all over the batch."""
    plan = make_plan((40,) * 6, global_batch=32, num_lanes=4)
    assert plan.left_over == (16,)
    places = [(step, lane, row) for step in range(7) for lane in range(4) for row in range(8)]
    orders = [tuple(pairs(plan.substitutes(*place))) for place in places]
    assert len(set(orders)) == len(places)
    firsts = Counter(order[0] for order in orders)
    # 224 positions over 16 of the left-over: 14 each, standard deviation 3.6.
    assert len(firsts) == 16
    assert max(firsts.values()) <= 14 + 5 * 3.6
    # The second pass has another left-over; another seed another order.
    assert set(pairs(plan.substitutes(7, 0, 0))) != set(orders[0])
    other = make_plan((40,) * 6, global_batch=32, num_lanes=4, seed=2)
    assert pairs(other.substitutes(0, 0, 0)) != list(orders[0])


def test_a_pass_without_left_over_has_no_substitutes():
    assert make_plan((8, 8)).substitutes(0, 0, 0).shape == (0, 2)


@given(plan=plans())
def test_a_lane_is_a_contiguous_part_of_the_canonical_order(plan):
    order = plan._pass_order(0, 0)
    lane_length = plan.steps_per_pass[0] * plan.lane_batch
    for lane in range(plan.num_lanes):
        taken = np.concatenate([step.refs[lane] for step in of_pass(plan, 0)])
        assert np.array_equal(taken, order.locate(lane * lane_length, (lane + 1) * lane_length))


@given(plan=plans(), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_random_access_equals_reading_in_order(plan, cuts):
    (source,) = plan.sources
    total = source.num_samples
    order, fresh = (PassOrder(source, 3, seed=5, pass_index=2, cached_windows=size) for size in (64, 1))
    whole = order.locate(0, total)
    assert sorted(pairs(whole)) == [
        (shard, slot) for shard, size in enumerate(source.shard_sizes) for slot in range(size)
    ]
    bounds = sorted({0, total, *(min(cut, total) for cut in cuts)})
    parts = [fresh.locate(start, stop) for start, stop in reversed(list(pairwise(bounds)))]
    assert np.array_equal(np.concatenate(parts[::-1]), whole)


def test_steps_can_be_read_in_any_order():
    steps = [7, 0, 23, 3, 23, 11]
    plan = make_plan()
    jumping = {step: plan[step].refs for step in steps}
    sequential = make_plan()
    for step in range(24):
        refs = sequential[step].refs
        assert step not in jumping or np.array_equal(refs, jumping[step])


def test_windows_mix_their_shards_and_no_others():
    sizes = (10,) * 12
    order = PassOrder(SourceShape("video", sizes), window_shards=4, seed=0, pass_index=0)
    shards = order.locate(0, 120)[:, 0]
    windows = [set(shards[start : start + 40].tolist()) for start in (0, 40, 80)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    # Mixed, not one shard after the other: neighbours are of one shard about once in four.
    assert (shards[1:] == shards[:-1]).mean() < 0.4
    # The shards themselves are permuted: windows are cut anew in every pass.
    later = PassOrder(SourceShape("video", sizes), window_shards=4, seed=0, pass_index=1).locate(0, 40)[:, 0]
    assert set(later.tolist()) not in windows


@pytest.mark.parametrize("change", [{"seed": 2}, {"name": "other"}, {"window_shards": 2}])
def test_the_order_depends_on(change):
    steps = range(make_plan().steps_per_epoch)
    one, other = make_plan(), make_plan(**change)
    assert not all(np.array_equal(one[step].refs, other[step].refs) for step in steps)


def test_passes_differ_and_so_does_what_is_left_over():
    plan = make_plan((9, 8, 9), global_batch=8)
    taken = [{pair for step in of_pass(plan, index) for pair in pairs(step.refs)} for index in range(6)]
    assert len({frozenset(part) for part in taken}) > 1
    batches = [pairs(of_pass(plan, index)[0].refs) for index in range(6)]
    assert len({tuple(batch) for batch in batches}) == 6


def test_samples_of_one_batch_do_not_meet_again_in_the_next_pass():
    """Of 16 samples of a batch about one meets another by chance; the order of the last pass would keep all 16."""
    plan = make_plan((32,) * 8, global_batch=16, num_lanes=4, window_shards=4)
    first, second = ([frozenset(pairs(step.refs)) for step in of_pass(plan, index)] for index in range(2))
    assert max(len(one & other) for one in first for other in second) <= 6


def kept_between_passes(num_shards, window_shards, num_passes=21):
    """Neighbours that 30 clips keep from one pass to the next: mean and most, over what chance gives."""
    sizes = [30 // num_shards + (number < 30 % num_shards) for number in range(num_shards)]
    plan = make_plan(sizes, window_shards=window_shards)
    passes = [
        [pair for step in of_pass(plan, pass_index) for pair in pairs(step.refs)] for pass_index in range(num_passes)
    ]
    neighbours = [{frozenset(two) for two in pairwise(taken)} for taken in passes]
    # 28 of 30 clips a pass: 27 pairs of the 435 that there are.
    chance = 27 * 27 / 435
    kept = [len(one & other) / chance for one, other in pairwise(neighbours)]
    return float(np.mean(kept)), max(kept)


def test_thirty_clips_mix_well_whatever_their_shards():
    means, most = zip(*(kept_between_passes(num_shards, 8) for num_shards in range(1, 31)), strict=True)
    # 20 changes of pass each: the standard deviation of a mean is 0.17, and of the mean of all 0.03.
    assert max(means) < 1.6
    assert np.mean(means) < 1.15
    # 27 pairs: not even in the worst of 600 changes is a third of them kept.
    assert max(most) * 27 * 27 / 435 <= 9


def test_what_mixes_badly_is_seen_by_that_measure():
    """Two clips a shard, and one shard a window: they stay together in every pass."""
    assert kept_between_passes(15, 1)[0] > 4


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=5), rounds=st.integers(1, 3))
def test_mixes_are_exact_even_and_pure(weights, rounds):
    total = sum(weights)
    taken = [0] * len(weights)
    for step in range(rounds * total):
        source, before = mixed_step(step, weights)
        assert before == taken[source]
        taken[source] += 1
        for count, weight in zip(taken, weights, strict=True):
            # Each division rounds by half a step at most, and the ones after it divide what it left.
            assert abs(count - (step + 1) * weight / total) <= len(weights) / 2
        if (step + 1) % total == 0:
            assert taken == [(step + 1) // total * weight for weight in weights]


SOURCES = (SourceShape("a", (20,), 0.3), SourceShape("b", (8, 4), 0.1))
OPTIONS = {"seed": 0, "global_batch": 4, "num_lanes": 1, "window_shards": 2}


@pytest.mark.parametrize(
    ("mix", "sources", "expected"),
    [
        ("sizes", SOURCES, [5, 3]),
        ("alternate", SOURCES, [4, 4]),
        ("weights", SOURCES, [6, 2]),
        ("weights", (SourceShape("a", (20,), 7e-6), SourceShape("b", (8,), 1e-6)), [7, 1]),
        ("weights", (SourceShape("a", (20,), 3), SourceShape("b", (8,), 5)), [3, 5]),
    ],
)
def test_mixes_give_each_source_its_share(mix, sources, expected):
    plan = Plan(sources, **OPTIONS, mix=mix)
    steps = [plan[step] for step in range(8)]
    assert [sum(step.source == number for step in steps) for number in range(2)] == expected
    # Exactly once holds for each source by itself, however the other one is mixed in.
    num_steps = plan.steps_per_pass[1]
    first_pass = [step for step in (plan[i] for i in range(40)) if (step.source, step.pass_index) == (1, 0)]
    assert len(first_pass) == num_steps
    assert len({pair for step in first_pass for pair in pairs(step.refs)}) == num_steps * 4


def test_a_rare_source_is_not_made_frequent():
    plan = Plan([SourceShape("a", (8,), 1.0), SourceShape("b", (8,), 0.0001)], **OPTIONS, mix="weights")
    assert sum(plan[step].source for step in range(10_001)) == 1


def test_epoch_and_left_over():
    plan = Plan([SourceShape("a", (21,)), SourceShape("b", (9, 6))], **OPTIONS)
    assert plan.steps_per_pass == (5, 3)
    assert plan.steps_per_epoch == 8
    assert plan.left_over == (1, 3)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((9,), {"global_batch": 9}, "stream.global_batch 9 is not a multiple of stream.num_lanes 2; use for example 8"),
        ((99,), {"global_batch": 20, "num_lanes": 16}, "use for example 32"),
        ((99,), {"global_batch": 15, "num_lanes": 15}, "leaves 1 sample a lane; VTM needs at least 2 .*num_lanes=5$"),
        ((9,), {"global_batch": 1, "num_lanes": 1}, "at least 2 samples"),
        (
            (3, 4),
            {"global_batch": 8, "num_lanes": 2},
            "'video' has 7 samples, .* batch of 8: .* stream.global_batch=6$",
        ),
        ((3, 0), {"global_batch": 8, "num_lanes": 2}, "stream.global_batch=3 with stream.num_lanes=1$"),
        ((1, 0), {"global_batch": 8, "num_lanes": 2}, "give it at least 2 samples, or leave it out"),
        ((), {}, "has 0 samples"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_way_out(sizes, changes, message):
    with pytest.raises(PlanError, match=message):
        make_plan(sizes, **changes)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive_numbers(weight):
    with pytest.raises(PlanError, match="source 'a' has"):
        Plan([SourceShape("a", (8,), weight)], **OPTIONS, mix="weights")


def test_world_sizes_that_do_not_divide_the_lanes_are_refused_with_those_that_do():
    with pytest.raises(PlanError, match=r"3 ranks do not divide the 16 lanes .*: 1, 2, 4, 8, 16 \("):
        lanes_of_rank(0, 3, 16)
    with pytest.raises(PlanError):
        lanes_of_rank(0, 32, 16)


def test_nothing_lies_outside_a_pass_or_before_the_first_step():
    order = PassOrder(SourceShape("video", (3, 4)), window_shards=2, seed=0, pass_index=0)
    assert order.locate(7, 7).shape == (0, 2)
    for start, stop in ((-1, 2), (6, 8), (3, 2)):
        with pytest.raises(IndexError):
            order.locate(start, stop)
    with pytest.raises(IndexError, match="count from 0"):
        make_plan()[-1]


def test_golden_order():
    """Whoever changes these numbers changes the order of every stored run: raise PLAN_VERSION with them."""
    assert PLAN_VERSION == 3
    plan = make_plan()
    assert [plan[step].refs.tolist() for step in (0, 1, 5, 6)] == GOLDEN
    mixed = Plan([SourceShape("a", (20,)), SourceShape("b", (8, 4))], **OPTIONS)
    assert [mixed[step].source for step in range(16)] == GOLDEN_SOURCES


GOLDEN = [
    [[[2, 4], [2, 3]], [[0, 0], [0, 4]]],
    [[[2, 5], [2, 0]], [[5, 2], [0, 2]]],
    [[[5, 0], [5, 1]], [[6, 0], [4, 2]]],
    [[[5, 2], [2, 1]], [[5, 0], [6, 0]]],
]
GOLDEN_SOURCES = [0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0]
