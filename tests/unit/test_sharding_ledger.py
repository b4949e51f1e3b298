import json
from dataclasses import replace

import pytest
from shard_files import write_shard

from alpro_sharding.ledger import Ledger, RejectedRows, overview
from alpro_sharding.results import Failure, ShardResult, Work
from alpro_sharding.statistics import Statistics
from alpro_stream.errors import ShardError

PLAN = {"options": {"fps": 3.0}}
WORK = Work("here", 1.5, 0.1, 1.0, 0.2, 0.1)


def result_of(num_rows, shard=None, failures=(), nouns=None):
    return ShardResult(num_rows, shard, failures, nouns or {}, Statistics(), WORK)


def make(ledger, part, split="train", names=("video-000000",)):
    """Makes the shards of a manifest and notes them."""
    for name in names:
        shard = write_shard(ledger.directory(split), name)
        ledger.note(split, name).write_bytes(result_of(3, shard).to_json())
        ledger.note(split, name).with_suffix(".hashes").write_bytes(b"")
    del part


def test_a_result_is_read_back(tmp_path):
    failure = Failure(3, "a", "a.mp4", "decode", "decoding failed after 7 frames")
    result = result_of(2, write_shard(tmp_path), (failure,), {"dog": 2, "ant": 1})
    assert ShardResult.from_json(result.to_json()) == result
    nothing = result_of(1, None, (failure,))
    assert ShardResult.from_json(nothing.to_json()) == nothing


def test_a_plan_under_which_nothing_was_made_may_be_replaced(tmp_path):
    with Ledger(tmp_path, {"options": "wrong"}) as ledger:
        ledger.open_part("m.jsonl", "aa", 3, "/media", append=False)
        ledger.directory("train")
        ledger.note("train", "video-000000").write_text("{}")
    with Ledger(tmp_path, {"options": "corrected"}) as ledger:
        assert not ledger.note("train", "video-000000").exists()
        assert ledger.parts() == []
    with Ledger(tmp_path, {"options": "corrected"}):
        pass


def test_a_manifest_under_which_nothing_was_made_may_be_replaced(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        ledger.open_part("m.jsonl", "aa", 3, "/media", append=False)
        assert ledger.open_part("n.jsonl", "bb", 3, "/media", append=False).number == 0
        assert [part.digest for part in ledger.parts()] == ["bb"]


def test_another_manifest_is_refused_unless_it_is_appended(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        first = ledger.open_part("first.jsonl", "aa", 9, "/media", append=False)
        make(ledger, first, names=("video-000000", "video-000001"))
        with pytest.raises(ShardError, match=r"'first.jsonl' \(9 rows.*now 'second.jsonl' \(4 rows.*append=true"):
            ledger.open_part("second.jsonl", "bb", 4, "/media", append=False)
        with pytest.raises(ShardError, match="are not all made; finish that manifest first"):
            ledger.open_part("second.jsonl", "bb", 4, "/media", append=True)  # the first was not planned to its end
        first = replace(first, num_shards={("train", "video"): 2})
        ledger.save_part(first)
        second = ledger.open_part("second.jsonl", "bb", 4, "/media", append=True)
        assert (second.number, second.first_numbers) == (1, {("train", "video"): 2})
        assert ledger.open_part("first.jsonl", "aa", 9, "/media", append=False) == first
        assert ledger.open_part("second.jsonl", "bb", 4, "/media", append=False) == second


def test_a_manifest_is_not_appended_before_all_shards_of_the_first_are_made(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        first = ledger.open_part("first.jsonl", "aa", 9, "/media", append=False)
        make(ledger, first)
        ledger.save_part(replace(first, num_shards={("train", "video"): 2}))
        with pytest.raises(ShardError, match="are not all made"):
            ledger.open_part("second.jsonl", "bb", 4, "/media", append=True)


def test_media_that_were_moved_are_refused_unless_told_so(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        ledger.open_part("m.jsonl", "aa", 3, "/media", append=False)
        with pytest.raises(ShardError, match=r"begun with media in /media, now it is /moved.*moved_media=true"):
            ledger.open_part("m.jsonl", "aa", 3, "/moved", append=False)
        assert ledger.open_part("m.jsonl", "aa", 3, "/moved", append=False, moved_media=True).media_root == "/moved"
        assert ledger.open_part("m.jsonl", "aa", 3, "/moved", append=False).media_root == "/moved"


def test_rejected_rows_are_read_back_in_order(tmp_path):
    failures = [Failure(1, None, None, "manifest", "not JSON"), Failure(7, "\ud800", "a.mp4", "manifest", "no text")]
    with Ledger(tmp_path, PLAN) as ledger:
        part = ledger.open_part("m.jsonl", "aa", 9, "/media", append=False)
        rejected = RejectedRows(ledger.rejected_path(part))
        for failure in failures:
            rejected.add(failure)
        assert not ledger.rejected_path(part).exists()
        rejected.publish()
        assert list(ledger.rejected(part)) == failures


def test_the_overview_counts_what_is_planned_running_done_and_failed(tmp_path):
    with pytest.raises(ShardError, match="no ledger"):
        overview(tmp_path)
    with Ledger(tmp_path, PLAN) as ledger:
        part = ledger.open_part("m.jsonl", "aa", 9, "/media", append=False)
        make(ledger, part)
        failures = (Failure(4, "a", "a.mp4", "decode", "no"), Failure(5, "b", "b.mp4", "filter", "short"))
        ledger.note("train", "video-000001").write_bytes(result_of(2, None, failures).to_json())
        ledger.note("train", "video-000002").with_suffix(".running").write_text("17")
        assert ledger.num_running_rows("train", "video-000002") == 17
        assert overview(tmp_path)["splits"]["train"]["shards_planned"] is None
        ledger.save_part(replace(part, num_shards={("train", "video"): 3}))
        assert overview(tmp_path) == {
            "manifests": [{"manifest": "m.jsonl", "rows": 9, "rows_rejected": None}],
            "splits": {
                "train": {
                    "shards_planned": 3,
                    "shards_running": 1,
                    "shards_done": 2,
                    "rows_done": 5,
                    "rows_failed": 2,
                    "rows_to_retry": 1,
                }
            },
        }
        assert json.dumps(overview(tmp_path))


def test_a_split_may_have_any_name(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        for split in ("parts", "lock", "plan"):
            assert ledger.directory(split).is_dir()


def test_done_is_what_has_a_result_and_its_files(tmp_path):
    with Ledger(tmp_path, PLAN) as ledger:
        directory = ledger.directory("train")
        assert ledger.result("train", "video-000000") is None
        result = result_of(3, write_shard(directory))
        ledger.note("train", "video-000000").write_bytes(result.to_json())
        assert ledger.result("train", "video-000000") is None  # its hashes are not there
        ledger.note("train", "video-000000").with_suffix(".hashes").write_bytes(b"")
        assert ledger.result("train", "video-000000") == result
        (directory / "video-000000.idx").rename(directory / "elsewhere")
        assert ledger.result("train", "video-000000") is None
        (directory / "elsewhere").rename(directory / "video-000000.idx")
        (directory / "video-000000.tar").write_bytes(b"cut off")
        assert ledger.result("train", "video-000000") is None
        ledger.note("train", "video-000000").write_bytes(b'{"half')
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
    with pytest.raises(ShardError, match=r"options.fps: 3.0 != 1.0.*Give this run another `out`"):
        Ledger(tmp_path, {"options": {"fps": 1.0}})
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
