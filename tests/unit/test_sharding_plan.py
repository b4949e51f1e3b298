import pytest

from alpro_sharding.assign import plan_shards
from alpro_sharding.config import ShardConfig, WordpieceConfig
from alpro_stream.config import load_config, validate
from alpro_stream.errors import ConfigError
from alpro_stream.manifest import ManifestRow


def rows(*groups):
    return [
        ManifestRow(f"r{line}", "m.mp4", ("c",), (), None, None, split, kind, line)
        for line, (split, kind) in enumerate(groups, 1)
    ]


def test_rows_go_to_shards_in_manifest_order_by_split_and_kind():
    video, image, val = ("train", "video"), ("train", "image"), ("val", "video")
    planned = list(plan_shards(rows(video, image, video, val, video, video, image, video), 2))
    assert [(p.split, p.name, [row.line for row in p.rows]) for p in planned] == [
        ("train", "video-000000", [1, 3]),
        ("train", "video-000001", [5, 6]),
        ("train", "image-000000", [2, 7]),
        ("train", "video-000002", [8]),
        ("val", "video-000000", [4]),
    ]


def test_full_shards_are_planned_before_the_manifest_is_read_to_its_end():
    def endless():
        line = 0
        while True:
            line += 1
            yield ManifestRow(f"r{line}", "m.mp4", ("c",), (), None, None, "train", "video", line)

    first = next(plan_shards(endless(), 3))
    assert [row.line for row in first.rows] == [1, 2, 3]


def test_the_shards_of_a_later_manifest_have_the_numbers_after_those_of_the_first():
    video, image = ("train", "video"), ("train", "image")
    planned = list(plan_shards(rows(video, image, video), 1, {video: 7}))
    assert [p.name for p in planned] == ["video-000007", "image-000000", "video-000008"]


def test_no_rows_no_shards():
    assert list(plan_shards([], 10)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frames.fps=0", "'frames.fps'"),
        ("frames.max_frames=1001", "'frames.max_frames'"),
        ("frames.quality=100", "'frames.quality'"),
        ("num_workers=0", "'num_workers'"),
        ("wordpiece={vocab_size: 10}", "vocab_size"),
        ("in_place=true", "payload=video"),
        ("frames.sampling=keyframe", "'frames.sampling'"),
        ("sample_per_shard=3", "did you mean 'samples_per_shard'"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, override, message):
    path = tmp_path / "shard.yaml"
    path.write_text("manifest: m.jsonl\nwork_dir: runs/x\nout: ${work_dir}/shards\n")
    assert load_config(ShardConfig, path, ["work_dir=runs/mine"]).out == "runs/mine/shards"
    with pytest.raises(ConfigError, match=message):
        load_config(ShardConfig, path, [override])


def test_only_what_decides_the_bytes_is_part_of_the_plan():
    base = {"manifest": "m", "out": "o"}
    config = validate(ShardConfig, base, "test")
    others = {"num_workers": 2, "entities": {"num": 5}, "wordpiece": {}, "contact": "a@b"}
    same = validate(ShardConfig, {**base, **others}, "test")
    assert config.sample_options() == same.sample_options()
    other = validate(ShardConfig, {**base, "frames": {"quality": 80}}, "test")
    assert other.sample_options() != config.sample_options()
    assert "video" not in config.sample_options()
    assert validate(ShardConfig, {**base, "payload": "video"}, "test").sample_options()["video"]["crf"] == 23
    assert same.wordpiece == WordpieceConfig(vocab_size=30522)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_place": True}, "set payload=video"),
        ({"in_place": True, "payload": "video", "append": True}, "cannot heed append; remove it"),
        (
            {"in_place": True, "payload": "video", "filters": {"min_side": 9}, "wordpiece": {}},
            "cannot heed filters, wordpiece",
        ),
        ({"payload": "video", "filters": {"drop_black": 5}}, "look at stored frames"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(ShardConfig, {"manifest": "m", "out": "o", **changes}, "test")
