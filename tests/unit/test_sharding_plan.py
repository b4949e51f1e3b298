import pytest
from shard_files import write_shard

from alpro_sharding.assign import plan_shards
from alpro_sharding.config import ShardConfig, WordpieceConfig
from alpro_sharding.ledger import Ledger, digest_manifest
from alpro_sharding.worker import Failure, ShardResult
from alpro_stream.config import load_config, validate
from alpro_stream.errors import ConfigError, ManifestError, ShardError
from alpro_stream.manifest import ManifestRow

PLAN = {"manifest_sha256": "ab", "fps": 3.0}


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


def test_no_rows_no_shards():
    assert list(plan_shards([], 10)) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fps=0", "'fps'"),
        ("max_frames=1001", "'max_frames'"),
        ("quality=100", "'quality'"),
        ("num_workers=0", "'num_workers'"),
        ("wordpiece={vocab_size: 10}", "vocab_size"),
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
    same = validate(ShardConfig, {**base, "num_workers": 2, "num_entities": 5, "wordpiece": {}}, "test")
    assert config.sample_options() == same.sample_options()
    assert validate(ShardConfig, {**base, "quality": 80}, "test").sample_options() != config.sample_options()
    assert same.wordpiece == WordpieceConfig(vocab_size=30522)


def test_a_manifest_is_identified_by_its_bytes(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"a\nb\nc")
    first = digest_manifest(path)
    assert first.num_lines == 3
    path.write_bytes(b"a\nb\nc\n")
    assert digest_manifest(path).num_lines == 3
    assert digest_manifest(path).sha256 != first.sha256
    path.write_bytes(b"")
    assert digest_manifest(path).num_lines == 0
    with pytest.raises(ManifestError, match="cannot read the manifest"):
        digest_manifest(tmp_path / "none")


def test_a_result_is_read_back(tmp_path):
    failure = Failure(3, "a", "a.mp4", "decode", "decoding failed after 7 frames")
    result = ShardResult(2, write_shard(tmp_path), (failure,), {"dog": 2, "ant": 1})
    assert ShardResult.from_json(result.to_json()) == result
    nothing = ShardResult(1, None, (failure,), {})
    assert ShardResult.from_json(nothing.to_json()) == nothing


def test_done_is_what_has_a_result_and_its_files(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        directory = ledger.directory("train")
        assert ledger.result("train", "video-000000") is None
        result = ShardResult(3, write_shard(directory), (), {})
        ledger.result_path("train", "video-000000").write_bytes(result.to_json())
        assert ledger.result("train", "video-000000") == result
        (directory / "video-000000.idx").rename(directory / "elsewhere")
        assert ledger.result("train", "video-000000") is None
        (directory / "elsewhere").rename(directory / "video-000000.idx")
        (directory / "video-000000.tar").write_bytes(b"cut off")
        assert ledger.result("train", "video-000000") is None
        ledger.result_path("train", "video-000000").write_bytes(b'{"half')
        assert ledger.result("train", "video-000000") is None


def test_leftovers_of_killed_workers_are_removed(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        leftover = ledger.directory("train") / ".video-000000.tar.0123456789ab.tmp"
        leftover.write_bytes(b"half a shard")
        users_own = tmp_path / "train" / "notes.txt"
        users_own.write_text("mine")
    with Ledger(tmp_path, PLAN) as ledger:
        ledger.directory("train")
    assert not leftover.exists()
    assert users_own.exists()


def test_another_plan_is_refused_with_the_differences(tmp_path):
    Ledger(tmp_path, PLAN).close()
    write_shard(tmp_path / "train")
    Ledger(tmp_path, PLAN).close()
    with pytest.raises(ShardError, match=r"fps: 3.0 != 1.0.*Give this run another `out`"):
        Ledger(tmp_path, {**PLAN, "fps": 1.0})
    Ledger(tmp_path, PLAN).close()


def test_one_run_at_a_time(tmp_path):
    with Ledger(tmp_path, PLAN), pytest.raises(ShardError, match="another `alpro shard` is writing"):
        Ledger(tmp_path, PLAN)


def test_shards_of_unknown_origin_are_refused(tmp_path):
    write_shard(tmp_path / "train")
    with pytest.raises(ShardError, match="choose another `out`"):
        Ledger(tmp_path, PLAN)
    assert not (tmp_path / ".ledger").exists()


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ShardError, match="cannot write to"):
        Ledger(tmp_path / "file", PLAN)
