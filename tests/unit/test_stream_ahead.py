"""What is told to the cache: in the order of need, far enough ahead, and little at a time."""

import hashlib

import numpy as np
import pytest
from stream_parts import stream_config

from alpro_stream.shards.files import CachedFiles
from alpro_stream.shards.layout import load_dataset_info
from alpro_stream.shards.reader import ShardReader
from alpro_stream.stream import ahead
from alpro_stream.stream.ahead import LookAhead
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.cursor import steps_left
from alpro_stream.stream.sources import Listing, Source, open_sources
from alpro_stream.testing.shards import write_dataset, write_tokenizer

PLACE = "s3://corpus/train"


class ToldCache:
    """Stands for the cache: keeps the shards it is told of; the index of each comes before its tar."""

    def __init__(self):
        self.told, self.num_stops = [], 0

    def expect(self, files):
        names = [file.address.removeprefix(f"{PLACE}/") for file in files]
        shards = [name.removesuffix(".tar") for name in names[1::2]]
        assert names == [f"{shard}.{kind}" for shard in shards for kind in ("idx", "tar")]
        self.told.append(shards)

    def stop(self):
        self.num_stops += 1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ahead")
    write_dataset(root / "train", video_shards=[4] * 24, image_shards=[8, 8], num_frames=1)
    write_tokenizer(root / "tokenizer")
    return root


def open_remote(root, caches):
    """The sources as if they lay behind addresses, one cache for each."""
    info = load_dataset_info(root / "train")
    return tuple(
        Source(kind, kind, ShardReader(PLACE, info, CachedFiles(PLACE, cache)), tuple(info.shards_of(kind)), 1.0,
               "clip", Listing(info))
        for kind, cache in zip(("video", "image"), caches, strict=True)
    )  # fmt: skip


@pytest.fixture
def cache():
    return ToldCache()


@pytest.fixture
def sources(root, cache):
    return open_remote(root, (cache, cache))


@pytest.fixture
def plan(root, sources):
    return make_plan(stream_config(root), sources)


def needed(plan, sources, lanes, step):
    planned = plan.part(step, lanes)
    return {sources[planned.source].shards[number].name for number in np.unique(planned.refs[..., 0])}


def uses(plan, sources, lanes, steps):
    """The first and last step of each use: of a shard by one lane in one pass; with the shard's name."""
    found = {}
    for step in steps:
        planned = plan.part(step, lanes)
        for lane, refs in enumerate(planned.refs):
            for number in refs[:, 0].tolist():
                use = (sources[planned.source].shards[number].name, planned.pass_index, lane)
                found[use] = (found.get(use, (step,))[0], step)
    return [(name, first, last) for (name, _, _), (first, last) in found.items()]


def test_everything_is_told_before_it_is_needed_and_what_comes_first_is_first(plan, sources, cache):
    """Over three passes, all of which are soon in view: what was read in one is needed again in the next."""
    lanes, steps = range(1, 3), range(3 * plan.steps_per_epoch)
    look = LookAhead(plan, lanes, sources, iter(steps))
    for step in steps:
        look.reached(step)
        seen = range(min(steps.stop, (step + 1) * ahead._STEPS_AT_ONCE))
        nearest = {}
        for name, first, last in uses(plan, sources, lanes, seen):
            if last >= step:
                nearest[name] = min(max(first, step), nearest.get(name, steps.stop))
        told = cache.told[-1]
        assert len(told) == len(set(told))
        assert nearest.keys() == set(told)
        assert sorted(nearest.values()) == [nearest[name] for name in told]


def test_what_is_read_by_other_ranks_is_not_told(plan, sources, cache):
    for lanes in (range(0, 2), range(2, 4)):
        cache.told.clear()
        look = LookAhead(plan, lanes, sources, iter(range(5)))
        look.reached(0)
        assert set(cache.told[-1]) == set().union(*(needed(plan, sources, lanes, step) for step in range(5)))


def test_what_is_behind_is_dropped(plan, sources, cache):
    look = LookAhead(plan, range(4), sources, iter(range(plan.steps_per_epoch)))
    for step in range(plan.steps_per_epoch):
        look.reached(step)
    last = cache.told[-1]
    assert set(last) == needed(plan, sources, range(4), plan.steps_per_epoch - 1)


def test_steps_that_are_left_out_are_not_fetched(plan, sources, cache):
    skipped = steps_left(0, 10, ((1, 9),))
    LookAhead(plan, range(4), sources, skipped).reached(0)
    wanted = needed(plan, sources, range(4), 0) | needed(plan, sources, range(4), 9)
    assert set(cache.told[-1]) == wanted


def test_one_step_costs_the_look_at_some_and_the_view_has_an_end(plan, sources, monkeypatch):
    looked = []
    part = type(plan).part
    monkeypatch.setattr(type(plan), "part", lambda self, step, lanes: looked.append(step) or part(self, step, lanes))
    monkeypatch.setattr(ahead, "_MAX_STEPS", 40)
    look = LookAhead(plan, range(4), sources, iter(range(10_000)))
    counts = []
    for step in range(100):
        look.reached(step)
        counts.append(len(looked))
    assert max(np.diff([0, *counts])) <= ahead._STEPS_AT_ONCE
    assert looked == list(range(100 + 40))


def test_a_cache_hears_nothing_while_nothing_changes(root):
    caches = (ToldCache(), ToldCache())
    sources = open_remote(root, caches)
    plan = make_plan(stream_config(root, window_shards=24), sources)
    look = LookAhead(plan, range(4), sources, iter(range(plan.steps_per_epoch)))
    for _ in range(3):
        look.reached(0)
    # The first look has seen the whole pass.
    assert plan.steps_per_epoch <= ahead._STEPS_AT_ONCE
    assert [len(cache.told) for cache in caches] == [1, 1]
    assert {name.partition("-")[0] for name in caches[0].told[0]} == {"video"}
    assert {name.partition("-")[0] for name in caches[1].told[0]} == {"image"}


def test_local_data_costs_nothing(root):
    def steps():
        raise AssertionError("nobody has to look ahead")
        yield

    sources = open_sources(stream_config(root).sources)
    LookAhead(make_plan(stream_config(root), sources), range(4), sources, steps()).reached(0)


def test_a_file_is_told_with_its_digest_and_size(root, cache):
    (source, _) = open_remote(root, (cache, cache))
    tar, index = source.reader.files.tar(source.shards[0]), source.reader.files.index(source.shards[0])
    contents, lines = ((root / f"train/video-000000.{kind}").read_bytes() for kind in ("tar", "idx"))
    assert tar == (f"{PLACE}/video-000000.tar", hashlib.sha256(contents).hexdigest(), len(contents))
    # The description has no size of an index.
    assert index == (f"{PLACE}/video-000000.idx", hashlib.sha256(lines).hexdigest(), None)


def test_small_data_sets_are_seen_for_many_passes_and_not_without_end(plan, sources, cache, monkeypatch):
    monkeypatch.setattr(ahead, "_MAX_NEEDS", 50)
    look = LookAhead(plan, range(4), sources, iter(range(10_000)))
    for step in range(60):
        look.reached(step)
        assert needed(plan, sources, range(4), step + 1) <= set(cache.told[-1])
        assert len(look._needs) <= 50 + 4 * plan.lane_batch


def test_stopping_stops_each_cache_once(root, plan, sources, cache):
    LookAhead(plan, range(4), sources, iter(())).stop()
    assert cache.num_stops == 1
    caches = (ToldCache(), ToldCache())
    LookAhead(plan, range(4), open_remote(root, caches), iter(())).stop()
    assert [cache.num_stops for cache in caches] == [1, 1]
    LookAhead(plan, range(4), open_sources(stream_config(root).sources), iter(())).stop()
