"""What `benchmarks/plan.py` measures is what it says."""

import pytest

from alpro_stream.shards.reader import ShardReader
from benchmarks import plan, readme


def test_linked_shards_are_a_whole_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_SIZE", 3)
    reader = ShardReader(plan.write_links(tmp_path / "train", 4))
    assert reader.info.num_samples == 12
    last = reader.info.shards[-1].name
    assert last == "video-000003"
    members = reader.index(last).frame_members(2)
    assert len(members) == plan.NUM_FRAMES
    assert reader.read(last, 2, members[:1])[0].startswith(b"\xff\xd8")


def test_costs_are_compared_over_all_places(monkeypatch):
    rows = plan.plan_rows((50,) * 40, num_steps=2, repetitions=1)
    assert [row.unit for row in rows] == 8 * ["ms"] + 2 * ["x"]
    assert all(row.value > 0 for row in rows)
    # Dearer from step to step, and by lanes: the 100th pass costs the most.
    monkeypatch.setattr(plan, "_plan_ms", lambda shape, lanes, first, num_steps: len(lanes) * (100 + first))
    *_, whole, share = plan.plan_rows((50,) * 40, num_steps=2, repetitions=1)
    assert whole.value == share.value == (100 + 99 * 7 + 2) / 100
    assert (whole.ok, share.ok) == (False, False)


def test_resuming_is_compared_round_by_round(monkeypatch):
    seconds = {0: iter((9.0, 1.0, 5.0, 2.0)), 19531: iter((9.0, 2.0, 5.5, 2.25))}
    monkeypatch.setattr(plan, "_ask", lambda what, directory, step: {"seconds": next(seconds[step])})
    *_, beyond = plan._resume_rows(None, 3)
    assert (beyond.value, beyond.ok) == (0.5, True)
    assert beyond.spread == pytest.approx(0.375 / 0.5)


def test_an_index_is_parsed_as_a_whole():
    parsing, size = plan.index_rows(2)
    assert (parsing.name, parsing.unit, size.unit) == (f"{readme.INDEX}: parsing", "ms", "MB")
    assert parsing.value > 0
    assert 0.5 < size.value < 1.5
