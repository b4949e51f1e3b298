import json
import shutil
from dataclasses import replace

import pytest
import torch
from stream_parts import IMAGE_SIZE, NUM_FRAMES, assert_batches_equal, open_maker, read_all, stream_config

from alpro_stream.errors import DataError, SampleError
from alpro_stream.shards.index import ShardIndex
from alpro_stream.stream.isolated import IsolatedError
from alpro_stream.stream.quarantine import (
    Failure,
    Occurrence,
    Quarantine,
    QuarantineConfig,
    QuarantineError,
    read_failures,
    read_record,
    summary,
)
from alpro_stream.stream.text import IGNORED_LABEL
from alpro_stream.testing.shards import write_dataset, write_tokenizer

FAILURE = Failure(
    Occurrence(7, 5, "video-000002", 3), "video", "d1", 1, "video-000002:3 clip_9", "decode", "no\u2028good\n", None
)


def failed(number):
    return replace(FAILURE, occurrence=Occurrence(number, 0, "video-000000", number))


def count(quarantine, *failures):
    for failure in failures:
        quarantine.count(failure and SampleError(failure.place, failure.cause, failure.reason))


def test_a_failure_survives_its_line():
    assert Failure.from_json(FAILURE.to_json()) == FAILURE
    values = json.loads(FAILURE.to_json())
    # As in the sharding's failures.jsonl, so that one reader serves both.
    assert (values["id"], values["media"], values["stage"]) == ("clip_9", "video-000002:3", "decode")


def test_what_is_recorded_is_known_to_the_next_sitting(tmp_path):
    first = Quarantine(QuarantineConfig(), 0, tmp_path)
    assert first.recall(FAILURE.occurrence) is None
    first.record(FAILURE)
    second = Quarantine(QuarantineConfig(), 3, tmp_path, read_failures(tmp_path))
    error = second.recall(FAILURE.occurrence)
    assert isinstance(error, SampleError)
    assert (error.place, error.cause, error.reason) == (FAILURE.place, FAILURE.cause, FAILURE.reason)
    assert second.recall(FAILURE.occurrence._replace(step=8)) is None
    assert second.recall(FAILURE.occurrence._replace(row=4)) is None
    second.record(FAILURE)
    second.record(failed(1))
    first.record(failed(2))
    assert read_failures(tmp_path) == [FAILURE, failed(2), failed(1)]


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_is_whole(tmp_path):
    quarantine = Quarantine(QuarantineConfig(), 0, tmp_path)
    for number in range(3):
        quarantine.record(failed(number))
    quarantine.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert read_record(path) == [failed(0), failed(1)]
    again = Quarantine(QuarantineConfig(), 0, tmp_path)
    again.record(failed(5))
    assert read_record(path) == [failed(0), failed(1), failed(5)]


def test_a_damaged_line_costs_no_other(tmp_path, caplog):
    quarantine = Quarantine(QuarantineConfig(), 0, tmp_path)
    for number in range(3):
        quarantine.record(failed(number))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"step": 1', '"step": "x"'))
    assert read_record(path) == [failed(0), failed(2)]
    assert "a line cannot be read" in caplog.text


def test_what_was_written_down_of_other_data_counts_no_more():
    known = [failed(1), replace(failed(2), data="d2")]
    quarantine = Quarantine(QuarantineConfig(), known=known, data={"video": "d2"})
    assert quarantine.recall(failed(1).occurrence) is None
    assert quarantine.recall(failed(2).occurrence) is not None


def test_a_record_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "rank-00000.jsonl").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"rank-00000\.jsonl cannot be written: No space left on device; make room"):
        Quarantine(QuarantineConfig(), 0, tmp_path).record(FAILURE)


def test_a_summary_counts_planned_samples_by_cause():
    failures = [failed(0), replace(failed(1), cause="deadline", substitute="video-000001:0 k"), failed(2)]
    # A substitute that could not be used either.
    failures.append(replace(failed(2), occurrence=Occurrence(2, 0, "video-000003", 8), cause="crash"))
    assert summary(failures) == {"num": 3, "by_cause": {"decode": 2, "deadline": 1}, "num_masked": 2}


@pytest.mark.parametrize(("max_rate", "tolerated"), [(0.05, 50), (0, 0), (0.002, 2)])
def test_a_rate_is_of_a_thousand_samples_and_stops_the_run(max_rate, tolerated):
    quarantine = Quarantine(QuarantineConfig(max_rate=max_rate), 4)
    for number in range(tolerated):
        count(quarantine, None, failed(number), None)
    with pytest.raises(QuarantineError, match=rf"^{tolerated + 1} of the last {3 * tolerated + 1} samples of rank 4"):
        count(quarantine, failed(tolerated))


def test_old_failures_are_forgotten():
    quarantine = Quarantine(QuarantineConfig(max_rate=0.002))
    for number in range(20):
        count(quarantine, failed(number), *[None] * 499)


def test_failures_in_a_row_stop_the_run_and_are_named():
    quarantine = Quarantine(QuarantineConfig(max_rate=1, max_consecutive=3))
    count(quarantine, failed(0), failed(1), None, failed(2))
    with pytest.raises(QuarantineError) as caught:
        count(quarantine, failed(3), replace(failed(4), cause="deadline", reason="it took more than 30 s"))
    message = str(caught.value)
    assert message.startswith("3 samples in a row of rank 0 cannot be used (decode 2, deadline 1)")
    assert "video-000002:3 clip_9: it took more than 30 s" in message
    assert "stream.quarantine.max_consecutive=3" in message


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """19 videos: with batches of 8, three are left over in each pass."""
    root = tmp_path_factory.mktemp("quarantine")
    write_dataset(root / "train", video_shards=[5, 7, 1, 6], num_frames=9)
    write_tokenizer(root / "tokenizer")
    return root


def zero_frames(root, shard, slot):
    """Zeros in the second half of all frames of a sample."""
    for frame in ShardIndex.load(root / "train" / f"{shard}.idx").frame_members(slot):
        with (root / "train" / f"{shard}.tar").open("r+b") as file:
            file.seek(frame.offset + frame.size // 2)
            file.write(bytes(frame.size - frame.size // 2))


@pytest.fixture
def damaged(root, tmp_path):
    """A copy in which video-000001:3 cannot be decoded."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    zero_frames(copy, "video-000001", 3)
    return copy


def place_of(plan, step, shard, slot):
    """Lane and row of a sample in a step; None when the step does not have it."""
    refs = plan[step].refs.tolist()
    return next(((lane, refs[lane].index([shard, slot])) for lane in range(4) if [shard, slot] in refs[lane]), None)


def step_with(plan, shard, slot, start=0):
    return next(step for step in range(start, 100) if place_of(plan, step, shard, slot))


def test_a_damaged_sample_is_replaced_by_one_that_its_pass_leaves_over(root, damaged, tmp_path):
    config = stream_config(damaged)
    maker, plan = open_maker(config, folder=tmp_path / "record")
    whole, _ = open_maker(stream_config(root))
    step = step_with(plan, 1, 3)
    lane, row = place_of(plan, step, 1, 3)
    batch, undamaged = maker.make(plan, step, range(4)), whole.make(plan, step, range(4))
    shard, slot = plan.substitutes(step, lane, row)[0].tolist()
    index = ShardIndex.load(root / "train" / f"video-{shard:06d}.idx")
    expected = list(undamaged.keys)
    expected[2 * lane + row] = index.key(slot)
    assert batch.keys == tuple(expected)
    assert batch.valid_B.all()
    assert (batch.num_quarantined, undamaged.num_quarantined) == (1, 0)
    others = [number for number in range(8) if number != 2 * lane + row]
    assert torch.equal(batch.frames_BTHWC[others], undamaged.frames_BTHWC[others])
    assert torch.equal(batch.mlm_ids_BL[others], undamaged.mlm_ids_BL[others])
    (failure,) = read_failures(tmp_path / "record")
    assert failure.place == "video-000001:3 video-00008"
    assert failure.occurrence == (step, 2 * lane + row, "video-000001", 3)
    assert (failure.cause, failure.source, failure.pass_index) == ("decode", "video", plan[step].pass_index)
    assert failure.substitute == f"video-{shard:06d}:{slot} {index.key(slot)}"
    assert batch.captions[2 * lane + row] == whole.sources[0].reader.metadata(f"video-{shard:06d}", slot).captions[0]


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 4])
def test_substitutes_do_not_depend_on_ranks_and_threads(damaged, num_workers, world_size):
    maker, plan = open_maker(stream_config(damaged))
    expected = [maker.make(plan, step, range(4)) for step in range(6)]
    config = stream_config(damaged, decode={"num_workers": num_workers})
    ranks = [read_all(*open_maker(config), range(6), rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(expected):
        keys = tuple(key for batches in ranks for key in batches[step].keys)
        assert keys == whole.keys
        assert torch.equal(torch.cat([batches[step].frames_BTHWC for batches in ranks]), whole.frames_BTHWC)
        assert sum(batches[step].num_quarantined for batches in ranks) == whole.num_quarantined
    assert sum(whole.num_quarantined for whole in expected) >= 2


def test_a_damaged_substitute_is_passed_over(root, damaged, tmp_path):
    plan = open_maker(stream_config(damaged))[1]
    step = step_with(plan, 1, 3)
    lane, row = place_of(plan, step, 1, 3)
    first, second, _ = plan.substitutes(step, lane, row).tolist()
    zero_frames(damaged, f"video-{first[0]:06d}", first[1])
    maker, _ = open_maker(stream_config(damaged), folder=tmp_path / "record")
    batch = maker.make(plan, step, range(4))
    key = ShardIndex.load(root / "train" / f"video-{second[0]:06d}.idx").key(second[1])
    assert batch.keys[2 * lane + row] == key
    assert batch.num_quarantined == 1
    places = [failure.place.partition(" ")[0] for failure in read_failures(tmp_path / "record")]
    assert places == ["video-000001:3", f"video-{first[0]:06d}:{first[1]}"]


def test_with_nothing_left_over_a_sample_is_masked(tmp_path):
    write_dataset(tmp_path / "train", video_shards=[8, 8], num_frames=9)
    write_tokenizer(tmp_path / "tokenizer")
    zero_frames(tmp_path, "video-000001", 3)
    maker, plan = open_maker(stream_config(tmp_path), folder=tmp_path / "record")
    assert plan.left_over == (0,)
    step = step_with(plan, 1, 3)
    lane, row = place_of(plan, step, 1, 3)
    batch = maker.make(plan, step, range(4))
    masked = 2 * lane + row
    assert batch.valid_B.tolist() == [number != masked for number in range(8)]
    assert batch.frames_BTHWC[masked].sum() == 0
    assert batch.captions[masked] == ""
    assert (batch.mlm_labels_BL[masked] == IGNORED_LABEL).all()
    assert batch.keys[masked] == "video-00011"
    assert batch.frames_BTHWC.shape[1] == NUM_FRAMES
    assert len(set(batch.video_id_B.tolist())) == 8
    assert read_failures(tmp_path / "record")[0].substitute is None


def test_a_whole_batch_that_is_damaged_is_masked_as_a_whole(tmp_path):
    write_dataset(tmp_path / "train", video_shards=[8], num_frames=9)
    write_tokenizer(tmp_path / "tokenizer")
    for slot in range(8):
        zero_frames(tmp_path, "video-000000", slot)
    config = stream_config(tmp_path)
    maker, plan = open_maker(config)
    batch = maker.make(plan, 0, range(4))
    assert not batch.valid_B.any()
    assert batch.num_quarantined == 8
    assert batch.frames_BTHWC.sum() == 0


def test_the_record_is_repeated_though_the_sample_could_be_used_now(root, damaged, tmp_path):
    """As after a time-out, which the next sitting would not have."""
    bad, plan = open_maker(stream_config(damaged), folder=tmp_path / "record")
    expected = [bad.make(plan, step, range(4)) for step in range(4)]
    known = read_failures(tmp_path / "record")
    repeated, _ = open_maker(stream_config(root), known=known, folder=tmp_path / "again")
    for step in range(4):
        assert_batches_equal(repeated.make(plan, step, range(4)), expected[step])
    assert read_failures(tmp_path / "again") == []
    # In the next pass nothing is known, and the sample is tried again.
    later = step_with(plan, 1, 3, start=4)
    assert repeated.make(plan, later, range(4)).num_quarantined == 0


def test_too_many_failures_end_the_stream_with_their_names(damaged, tmp_path):
    config = stream_config(damaged, quarantine={"max_rate": 0})
    with pytest.raises(QuarantineError, match=r"^1 of the last \d+ samples of rank 0 .*video-000001:3 video-00008: "):
        read_all(*open_maker(config, folder=tmp_path / "record"), range(20))


class Hanging:
    """A decoder that gives up every sample after a deadline, and counts them."""

    def __init__(self):
        self.num_clips = 0

    def empty(self, num_clips, num_frames):
        return torch.zeros(num_clips, num_frames, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)

    def start(self, clips, out_BTHWC):
        self.num_clips += len(clips)
        return lambda: [IsolatedError("deadline", "it took more than 30 s")] * len(clips)

    def finished(self, pixels):
        return pixels


def test_few_substitutes_are_waited_for_when_they_hang(root):
    maker, plan = open_maker(stream_config(root))
    hanging = replace(maker, decoder=Hanging())
    batch = hanging.make(plan, 0, range(4))
    assert not batch.valid_B.any()
    assert hanging.decoder.num_clips == 8 + 8 * 2


def test_a_limit_is_kept_before_substitutes_are_waited_for(root):
    config = stream_config(root, quarantine={"max_consecutive": 2})
    maker, plan = open_maker(config)
    hanging = replace(maker, decoder=Hanging())
    with pytest.raises(QuarantineError, match=r"^2 samples in a row of rank 0"):
        hanging.make(plan, 0, range(4))
    assert hanging.decoder.num_clips == 8 + 2
