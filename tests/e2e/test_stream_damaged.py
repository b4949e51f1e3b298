"""Training over a data set with damage of every kind: to the end, the same every time, and everything said."""

import json
import os
import re
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "resume"))

from dying_runs import assert_same_run, config, die_at_step, metrics_of, train_until_death
from stream_parts import assert_batches_equal, open_maker, read_all, stream_config

from alpro_stream.run import train
from alpro_stream.shards.index import ShardIndex, format_index
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.quarantine import QuarantineError, read_record
from alpro_stream.stream.sources import open_sources
from alpro_stream.testing.shards import write_dataset, write_tokenizer
from alpro_stream.train.checkpoint import read_state

# 590 samples: 14 are left over by batches of 16.
SHARDS = [*[12] * 49, 2]
WHOLE_SHARD = 49
BATCH = {"stream.global_batch": 16, "stream.num_lanes": 4, "stream.window_shards": 4}


class Damaged:
    """Shards of a folder that get damaged on purpose; `causes` says what is to be found, by ``shard:slot``."""

    def __init__(self, folder):
        self.folder = folder
        self.causes = {}

    def tar(self, shard):
        return self.folder / f"video-{shard:06d}.tar"

    def members(self, shard, slot):
        """The members by their extensions."""
        found = ShardIndex.load(self.tar(shard).with_suffix(".idx")).members(slot)
        return {member.extension: member for member in found}

    def expect(self, cause, shard, *slots):
        self.causes |= {f"video-{shard:06d}:{slot}": cause for slot in slots}

    def overwrite(self, cause, shard, slot, extension, change):
        """Changes the header and contents of a member; `change` gets both and gives as many bytes."""
        member = self.members(shard, slot)[extension]
        with self.tar(shard).open("r+b") as file:
            file.seek(member.offset - 512)
            before = file.read(512 + member.size)
            header, contents = change(before[:512], before[512:])
            assert len(header) == 512
            assert len(contents) == member.size
            assert header + contents != before
            file.seek(member.offset - 512)
            file.write(header + contents)
        self.expect(cause, shard, slot)

    def cut(self, shard, size, *slots):
        os.truncate(self.tar(shard), size)
        self.expect("truncated", shard, *slots)

    def write_index(self, cause, shard, change, *slots):
        """`change` gets the members of every sample in a list, and alters it."""
        path = self.tar(shard).with_suffix(".idx")
        index = ShardIndex.load(path)
        samples = [index.members(slot) for slot in range(len(index))]
        change(samples)
        path.write_bytes(format_index(samples))
        self.expect(cause, shard, *slots)


def flip_bits(data, start, stop):
    return data[:start] + bytes(byte ^ 0x55 for byte in data[start:stop]) + data[stop:]


def renamed(header):
    """A sound header of the same file under another name."""
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    info.name = f"x{info.name[1:]}"
    return info.tobuf(tarfile.USTAR_FORMAT)


def filled_up(data, size):
    return data + bytes(size - len(data))


def exchange(samples):
    samples[2], samples[7] = (
        tuple(one._replace(name=own.name) for one, own in zip(samples[7], samples[2], strict=True)),
        tuple(one._replace(name=own.name) for one, own in zip(samples[2], samples[7], strict=True)),
    )


def shift(samples):
    samples[4] = tuple(member._replace(offset=member.offset + 512) for member in samples[4])


def lose_frames(samples):
    samples[3] = tuple(member for member in samples[3] if not member.extension.endswith("jpg"))


def keep_one_frame(samples):
    samples[5] = samples[5][:3]


def damage_everything(folder):
    """Every kind once: 15 of 590 samples, which is 2.5 %."""
    all_ = Damaged(folder)
    all_.cut(WHOLE_SHARD, 0, 0, 1)
    all_.cut(1, all_.members(1, 11)["000.jpg"].offset + 40, 11)
    all_.overwrite("decode", 3, 5, "000.jpg", lambda header, data: (header, bytes(len(data))))
    all_.overwrite("metadata", 5, 0, "json", lambda header, data: (header, bytes(len(data))))
    all_.overwrite("index", 6, 6, "json", lambda header, data: (flip_bits(header, 0, 20), data))
    all_.overwrite("decode", 8, 1, "000.jpg", lambda header, data: (header, flip_bits(data, 0, 200)))
    # Damage behind the header, which some decoders paint over.
    all_.overwrite("decode", 24, 2, "000.jpg", lambda header, data: (header, data[:-102] + bytes(100) + data[-2:]))
    all_.overwrite("metadata", 9, 9, "json", lambda header, data: (header, flip_bits(data, 0, 30)))
    png = b"\x89PNG\r\n\x1a\n"
    all_.overwrite("decode", 11, 4, "000.jpg", lambda header, data: (header, filled_up(png, len(data))))
    all_.overwrite("index", 13, 8, "000.jpg", lambda header, data: (renamed(header), data))
    all_.write_index("empty", 15, lose_frames, 3)
    all_.write_index("index", 17, exchange, 2, 7)
    all_.write_index("index", 18, shift, 4)
    line = all_.tar(20).with_suffix(".idx")
    line.write_bytes(line.read_bytes().replace(b"jpg ", b"jpg x", 1))
    all_.expect("index", 20, 0)
    # Nothing is wrong with a clip of one frame.
    all_.write_index("", 22, keep_one_frame)
    return all_


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    write_dataset(root / "train", video_shards=SHARDS, num_frames=2, size=64)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def damaged(root):
    return damage_everything(root / "train")


def run_config(root, run_dir, **changes):
    sources = [{"path": str(root / "train"), "kind": "video"}]
    # So far ahead that a checkpoint finds failures which lie behind it.
    steps = {"train.max_steps": 36, "train.checkpoint_every": 12, "stream.decode.prefetch": 6}
    return config(root, run_dir, **{"stream.sources": sources, **BATCH, **steps, **changes})


@pytest.fixture(scope="module")
def undisturbed(root, damaged, tmp_path_factory):
    run = run_config(root, tmp_path_factory.mktemp("undisturbed"))
    train(run)
    return run


def record_of(run):
    return [failure for path in sorted((run.run_dir / "quarantine").iterdir()) for failure in read_record(path)]


def checkpoint_of(run, step):
    return run.run_dir / "checkpoints" / f"step-{step:06d}"


def plan_of(run):
    sources = open_sources(run.stream.sources)
    return sources, make_plan(run.stream, sources)


def test_everything_damaged_is_listed_with_its_cause_and_nothing_else(undisturbed, damaged):
    """One pass meets every sample but the left-over, of which it meets those that were tried as substitutes."""
    found = {failure.place.partition(" ")[0]: failure.cause for failure in record_of(undisturbed)}
    sources, plan = plan_of(undisturbed)
    pass_order = {
        f"{sources[0].shards[shard].name}:{unit}"
        for step in range(36)
        for shard, unit in plan[step].refs.reshape(-1, 2)
    }
    assert len(pass_order) == 576
    expected = {place: cause for place, cause in damaged.causes.items() if cause and place in pass_order}
    assert expected.items() <= found.items()
    assert found.items() <= damaged.causes.items()
    assert len(expected) >= 10
    for failure in record_of(undisturbed):
        slot = int(failure.place.partition(" ")[0].rpartition(":")[2])
        key = failure.place.partition(" ")[2]
        number = 12 * int(failure.occurrence.shard.rpartition("-")[2]) + slot
        # The index of one sample says nothing of its key.
        assert key in {f"video-{number:05d}", "?"}
        assert 0 < len(failure.reason) < 300
        assert failure.substitute is not None
        assert failure.substitute.partition(" ")[0] not in damaged.causes


def test_the_metrics_and_the_checkpoint_say_what_the_record_says(undisturbed):
    failures = record_of(undisturbed)
    sources, plan = plan_of(undisturbed)
    numbers = {shard.name: number for number, shard in enumerate(sources[0].shards)}
    planned = [0.0] * 36
    for failure in failures:
        if [numbers[failure.occurrence.shard], failure.occurrence.unit] in plan[failure.occurrence.step].refs.reshape(
            -1, 2
        ).tolist():
            planned[failure.occurrence.step] += 1
    lines = metrics_of(undisturbed.run_dir)
    assert [line["quarantined"] for line in lines] == planned
    assert sum(planned) >= 10
    assert all(line["loss/vtc"] > 0 for line in lines)
    for step in (24, 36):
        saved = checkpoint_of(undisturbed, step)
        assert read_record(saved / "quarantine.jsonl") == [
            failure for failure in failures if failure.occurrence.step < step
        ]
    values = json.loads((saved / "quarantine.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"video-\d{6}:\d+", values["media"])
    assert {"id", "media", "stage", "reason", "substitute", "step"} <= values.keys()
    # Substitutes that were tried in vain are listed and not counted.
    assert read_state(saved)["quarantine"]["num"] == sum(planned) < len(failures)


def test_killed_and_started_again_it_is_the_same_run(root, undisturbed, tmp_path):
    run = run_config(root, tmp_path)
    assert train_until_death(run, die_at_step, 20) == -signal.SIGKILL
    assert 0 < len(record_of(run)) < len(record_of(undisturbed))
    train(run)
    assert_same_run(run.run_dir, undisturbed.run_dir)
    assert record_of(run) == record_of(undisturbed)
    for step in (24, 36):
        assert (checkpoint_of(run, step) / "quarantine.jsonl").read_bytes() == (
            checkpoint_of(undisturbed, step) / "quarantine.jsonl"
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(5, 13, 25), (12, 24), (35,)])
def test_killed_several_times(root, undisturbed, tmp_path, steps):
    run = run_config(root, tmp_path)
    for step in steps:
        assert train_until_death(run, die_at_step, step) == -signal.SIGKILL
    train(run)
    assert_same_run(run.run_dir, undisturbed.run_dir)
    assert record_of(run) == record_of(undisturbed)


def stream_of(root, **changes):
    values = {"sources": [{"path": root / "train", "kind": "video"}], "global_batch": 16, "window_shards": 4, **changes}
    return stream_config(root, **values)


@pytest.fixture(scope="module")
def expected_batches(root, damaged):
    """Ten steps, one thread, one rank."""
    return read_all(*open_maker(stream_of(root)), range(10))


@pytest.mark.parametrize(
    ("world_size", "decode"),
    [
        (1, {"num_workers": 0}),
        (1, {"num_workers": 4, "prefetch": 5, "num_processes": 1}),
        (2, {"num_workers": 2, "prefetch": 1}),
        (4, {"num_workers": 0}),
    ],
)
def test_substitutes_are_the_same_for_any_ranks_threads_and_prefetch(root, expected_batches, world_size, decode):
    parts = [
        read_all(*open_maker(stream_of(root, decode=decode), rank=rank), range(10), rank, world_size)
        for rank in range(world_size)
    ]
    assert sum(batch.num_quarantined for batch in expected_batches) >= 3
    for step, expected in enumerate(expected_batches):
        cut = expected.micro_batches(world_size)
        for rank in range(world_size):
            # The number is that of the whole batch, of which every rank has its own share.
            own = replace(parts[rank][step], num_quarantined=cut[rank].num_quarantined)
            assert_batches_equal(own, cut[rank])
        assert sum(parts[rank][step].num_quarantined for rank in range(world_size)) == expected.num_quarantined


def test_an_index_that_was_cut_off_is_no_loss(root, undisturbed, tmp_path, caplog):
    """The tar has all that the index held."""
    shutil.copytree(root, tmp_path / "copy")
    index = tmp_path / "copy/train/video-000030.idx"
    index.write_bytes(index.read_bytes()[:300])
    run = run_config(tmp_path / "copy", tmp_path / "run")
    train(run)
    assert "video-000030.idx: 2 samples where its first line is b'v1.2 12'" in caplog.text
    assert_same_run(run.run_dir, undisturbed.run_dir)


@pytest.fixture
def small(tmp_path):
    """Two whole batches of 16, nothing left over."""
    root = tmp_path / "small"
    write_dataset(root / "train", video_shards=[12, 20], num_frames=2, size=64)
    write_tokenizer(root / "tokenizer")
    return root


def spoil(root, *places):
    """Damages the metadata of samples, each (shard, slot)."""
    all_ = Damaged(root / "train")
    for shard, slot in places:
        all_.overwrite("metadata", shard, slot, "json", lambda header, data: (header, bytes(len(data))))


def test_with_nothing_left_over_all_four_places_of_a_lane_may_be_masked_and_losses_stay_finite(small, tmp_path):
    for task in ("prompter", "pretrain"):
        run = run_config(
            small, tmp_path / task, **{"task": task, "losses.pem.weight": 0, "train.max_steps": 4, "stream.seed": 5}
        )
        if task == "prompter":
            # All samples of one lane of the first step, and two more in the second.
            _, plan = plan_of(run)
            places = [*plan[0].refs[1].tolist(), *plan[1].refs[0, :2].tolist()]
            spoil(small, *places)
        train(run)
        lines = metrics_of(run.run_dir)
        assert [line["quarantined"] for line in lines[:2]] == [4, 2]
        # The second pass has the same six, elsewhere.
        assert sum(line["quarantined"] for line in lines) == 12
        losses = [value for line in lines for name, value in line.items() if name.startswith("loss/")]
        assert torch.isfinite(torch.tensor(losses)).all()
        assert len(losses) == (4 if task == "prompter" else 12)
        failures = record_of(run)
        assert [failure.substitute for failure in failures] == [None] * 12
        assert read_state(checkpoint_of(run, 4))["quarantine"]["num_masked"] == 12


def test_a_batch_whose_samples_are_all_damaged_does_not_end_the_run(small, tmp_path):
    run = run_config(small, tmp_path / "run", **{"train.max_steps": 2})
    _, plan = plan_of(run)
    spoil(small, *plan[0].refs.reshape(-1, 2).tolist())
    train(run)
    lines = metrics_of(run.run_dir)
    assert [line["quarantined"] for line in lines] == [16, 0]
    assert lines[0]["loss/vtc"] == 0
    assert lines[1]["loss/vtc"] > 0


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("max_rate", 0.003, r"^4 of the last \d+ samples of rank 0 cannot be used \(.*\), at most .*max_rate=0\.003"),
        (
            "max_consecutive",
            3,
            r"^3 samples in a row of rank 0 cannot be used \(metadata \d\), at most .*consecutive=3",
        ),
    ],
)
def test_too_many_end_the_run_and_with_a_higher_limit_it_goes_on(small, tmp_path, limit, value, message):
    changes = {"train.max_steps": 6, "train.checkpoint_every": 1, "stream.decode.prefetch": 1}
    run = run_config(small, tmp_path / "run", **changes, **{f"stream.quarantine.{limit}": value})
    _, plan = plan_of(run)
    # Three in a row of the second pass, and elsewhere in the first.
    spoil(small, *plan[3].refs.reshape(-1, 2)[4:7].tolist())
    with pytest.raises(QuarantineError, match=message) as caught:
        train(run)
    text = str(caught.value)
    assert "metadata" in text
    assert re.search(r"video-00000[01]:\d+ video-\d{5}: damaged metadata", text)
    assert f"set stream.quarantine.{limit} higher" in text
    assert str(run.run_dir / "quarantine" / "rank-00000.jsonl") in text
    stopped_at = len(metrics_of(run.run_dir))
    assert 1 <= stopped_at < 6
    higher = run_config(small, tmp_path / "run", **changes)
    train(higher)
    calm = run_config(small, tmp_path / "calm", **changes)
    train(calm)
    assert_same_run(run.run_dir, calm.run_dir)
    assert sorted(record_of(higher), key=repr) == sorted(record_of(calm), key=repr)


def test_substitutes_that_are_damaged_too_are_passed_over_in_a_chain(tmp_path):
    """Two failed places in one batch share a left-over of three, two of which are damaged themselves."""
    root = tmp_path / "root"
    write_dataset(root / "train", video_shards=[10, 9], num_frames=2, size=64)
    write_tokenizer(root / "tokenizer")
    run = run_config(root, tmp_path / "run", **{"train.max_steps": 1})
    sources, plan = plan_of(run)
    left_over = plan.substitutes(0, 0, 0).tolist()
    places = [plan[0].refs[0, 0].tolist(), plan[0].refs[0, 1].tolist(), *left_over[:2]]
    assert len(left_over) == 3
    spoil(root, *places)
    train(run)
    shard, unit = left_over[2]
    good = f"{sources[0].shards[shard].name}:{unit}"
    record = record_of(run)
    assert {failure.substitute.partition(" ")[0] for failure in record} == {good}
    assert sorted([int(failure.occurrence.shard[-1]), failure.occurrence.unit] for failure in record) == sorted(places)
    assert metrics_of(run.run_dir)[0]["quarantined"] == 2
    (batch,) = read_all(*open_maker(run.stream), range(1))
    assert batch.keys[0] == batch.keys[1]
    assert batch.valid_B.all()
    # The same clip twice is no negative of itself.
    assert batch.video_id_B[0] == batch.video_id_B[1]
