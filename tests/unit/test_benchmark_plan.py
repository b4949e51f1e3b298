"""What `benchmarks/plan.py` measures is what it says."""

from alpro_stream.shards.reader import ShardReader
from benchmarks import plan


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
