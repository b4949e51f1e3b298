"""Stored videos through whole runs: decoders that hang or crash cost one sample, also after a restart."""

import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "resume"))

from dying_runs import assert_same_run, config, die_at_step, metrics_of, train_until_death
from stream_parts import assert_batches_equal, open_maker, read_all, stream_config

from alpro_stream.media import FrameConfig, encode_jpeg, sparse_frames
from alpro_stream.run import train
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata, VideoFile
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream import isolated
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.quarantine import read_failures
from alpro_stream.stream.sources import open_sources
from alpro_stream.testing.shards import caption_of, write_tokenizer

VIDEOS = Path(__file__).resolve().parents[2] / "examples/clips/videos"
CLIPS = [VIDEOS / name for name in ("v020.mkv", "v053.mp4", "v059.mkv", "v015.mp4")]
FRAMES = FrameConfig(fps=3, max_frames=8, size=64)
# Twelve clips in batches of four, and three left over.
SHARDS = (5, 4, 6)

# A decoder in whose folder files are called by the keys of clips, and hold what becomes of it there.
FAULTY = """
import os, signal, sys
from pathlib import Path
from alpro_stream.stream import isolated_process

decode_video = isolated_process._decode_video

def faulty(request, buffer):
    told = Path(__file__).with_name(request.identity[-1])
    if told.exists():
        fault, _, times = told.read_text().partition(" ")
        if times == "once":
            told.unlink()
        os.kill(os.getpid(), signal.Signals[fault])
    return decode_video(request, buffer)

isolated_process._decode_video = faulty
isolated_process.main(sys.argv[1:])
"""


def write_samples(folder, options, make):
    infos, numbers = [], itertools.count()
    for shard, size in enumerate(SHARDS):
        with ShardWriter(folder, f"video-{shard:06d}", "video") as writer:
            for number in itertools.islice(numbers, size):
                writer.add(make(number))
            infos.append(writer.close())
    save_dataset_info(folder, DatasetInfo.of_shards("train", options, infos))


def metadata(number, times=()):
    key = f"clip-{number:02d}"
    source = {"media": f"{key}.mp4", "sha256": str(number)}
    return SampleMetadata(key, key, (caption_of(number),), (), "video", times, source)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")

    def make(number):
        path = CLIPS[number % len(CLIPS)]
        return Sample(metadata(number), (), VideoFile(path.suffix[1:], path.open("rb"), path.stat().st_size))

    (root / "train").mkdir()
    write_samples(root / "train", {"payload": "video"}, make)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The folder that says which clips do what to their decoder."""
    folder = tmp_path / "faults"
    folder.mkdir()
    use_faulty(folder, monkeypatch.setattr)
    monkeypatch.syspath_prepend(folder)
    return folder


def use_faulty(folder, set_attribute):
    (folder / "faulty_decoder.py").write_text(FAULTY)
    set_attribute(isolated, "_PROCESS_MODULE", "faulty_decoder")


def fail_and_die_at_step(folder, step):
    sys.path.insert(0, str(folder))
    use_faulty(folder, setattr)
    die_at_step(step)


def stream_of(root, **changes):
    values = {"global_batch": 4, "num_lanes": 2, "video": FRAMES.model_dump(), **changes}
    return stream_config(root, **values)


def run_config(root, run_dir, deadline_s):
    """Four steps: a pass of three, and one of the next."""
    stream = {"global_batch": 4, "num_lanes": 2, "video": FRAMES.model_dump(), "decode.deadline_s": deadline_s}
    sources = [{"path": str(root / "train"), "kind": "video"}]
    changes = {f"stream.{name}": value for name, value in {**stream, "sources": sources}.items()}
    return config(root, run_dir, **changes, **{"train.max_steps": 4, "train.checkpoint_every": 1})


def keys_of(run, step):
    """Keys of what is planned, by lane and place."""
    sources = open_sources(run.stream.sources)
    plan = make_plan(run.stream, sources)
    firsts = np.cumsum([0, *SHARDS])
    return [f"clip-{firsts[shard] + slot:02d}" for shard, slot in plan[step].refs.reshape(-1, 2)]


def record_of(run):
    return [
        (f.occurrence.step, f.place.split(" ")[1], f.cause, f.substitute)
        for f in read_failures(run.run_dir / "quarantine")
    ]


def no_child_is_left():
    return not [child for child in psutil.Process().children() if "faulty_decoder" in " ".join(child.cmdline())]


def test_a_hang_is_recorded_and_repeated_though_the_clip_could_be_decoded_now(root, faults, tmp_path):
    config_ = stream_of(root, decode={"num_workers": 0, "num_processes": 1, "deadline_s": 2.0})
    hanging = open_maker(config_)[0].make(make_plan(config_, open_sources(config_.sources)), 0, range(2)).keys[1]
    (faults / hanging).write_text("SIGSTOP")
    (first,) = read_all(*open_maker(config_, folder=tmp_path / "record"), range(1))
    (failure,) = record = read_failures(tmp_path / "record")
    assert (failure.place.split(" ")[1], failure.cause) == (hanging, "deadline")
    assert first.keys[1] != hanging
    (faults / hanging).unlink()
    (again,) = read_all(*open_maker(config_, folder=tmp_path / "record", known=record), range(1))
    assert_batches_equal(again, first)
    assert read_failures(tmp_path / "record") == record
    (without,) = read_all(*open_maker(config_), range(1))
    assert without.keys[1] == hanging
    assert no_child_is_left()


@pytest.mark.slow
def test_a_decoder_that_hangs_costs_one_sample_and_a_restart_repeats_that_though_it_would_work_now(
    root, faults, tmp_path
):
    run = run_config(root, tmp_path / "run", deadline_s=2.0)
    hanging = next(key for key in keys_of(run, 1) if key not in keys_of(run, 3))
    (faults / hanging).write_text("SIGSTOP")
    # After the update of planned step 1, of which nothing is saved.
    assert train_until_death(run, fail_and_die_at_step, faults, 2) == -signal.SIGKILL
    ((step, *first),) = record_of(run)
    assert (step, *first[:2]) == (1, hanging, "deadline")
    assert first[2] is not None
    (failure,) = read_failures(run.run_dir / "quarantine")
    assert "it took more than" in failure.reason
    assert "(deadline 2 s)" in failure.reason
    (faults / hanging).unlink()  # it could be decoded now
    train(run)
    assert read_failures(run.run_dir / "quarantine") == [failure]
    assert [line["quarantined"] for line in metrics_of(run.run_dir)] == [0, 1, 0, 0]
    assert no_child_is_left()


@pytest.mark.slow
def test_a_restart_after_hangs_is_the_undisturbed_run_bit_by_bit(root, faults, tmp_path):
    run = run_config(root, tmp_path / "run", deadline_s=3.0)
    for key in (keys_of(run, 0)[0], keys_of(run, 2)[3]):
        (faults / key).write_text("SIGSTOP")
    undisturbed = run_config(root, tmp_path / "undisturbed", deadline_s=3.0)
    train(undisturbed)
    assert train_until_death(run, fail_and_die_at_step, faults, 4) == -signal.SIGKILL
    for told in faults.glob("clip-*"):
        told.unlink()
    train(run)
    assert_same_run(run.run_dir, undisturbed.run_dir)
    assert record_of(run) == record_of(undisturbed)
    assert {cause for _, _, cause, _ in record_of(run)} == {"deadline"}


def test_a_decoder_that_is_killed_once_costs_nothing_and_killed_twice_one_sample(root, faults, tmp_path):
    config_ = stream_of(root)
    expected = read_all(*open_maker(config_), range(1))[0]
    once, always = expected.keys[0], expected.keys[3]
    (faults / once).write_text("SIGKILL once")
    (faults / always).write_text("SIGSEGV")
    (found,) = read_all(*open_maker(config_, folder=tmp_path / "record"), range(1))
    assert not (faults / once).exists()
    (failure,) = read_failures(tmp_path / "record")
    assert (failure.place.split(" ")[1], failure.cause) == (always, "crash")
    assert failure.reason == "the process that decodes it was ended by signal 11, 2 times"
    assert found.keys[:3] == expected.keys[:3]
    assert torch.equal(found.frames_BTHWC[:3], expected.frames_BTHWC[:3])
    assert failure.substitute.split(" ")[1] == found.keys[3] != always
    assert no_child_is_left()


def test_a_decoder_that_is_stopped_from_outside_is_replaced(root, faults, tmp_path):
    """As when somebody stops it by hand; the clip is decoded in the next process."""
    config_ = stream_of(root, decode={"num_workers": 0, "num_processes": 1, "deadline_s": 2.0})
    maker, plan = open_maker(config_, folder=tmp_path / "record")
    first = maker.make(plan, 0, range(2))
    (child,) = [one for one in psutil.Process().children() if "faulty_decoder" in " ".join(one.cmdline())]
    os.kill(child.pid, signal.SIGSTOP)
    assert_batches_equal(maker.make(plan, 0, range(2)), first)
    assert not psutil.pid_exists(child.pid)
    maker.close()
    assert read_failures(tmp_path / "record") == []
    assert no_child_is_left()


def test_a_video_that_is_cut_off_or_none_is_replaced_as_any_other_sample(root, tmp_path):
    folder = tmp_path / "damaged"
    expected = read_all(*open_maker(stream_of(root)), range(1))[0]
    bad = {expected.keys[1]: b"", expected.keys[2]: CLIPS[1].read_bytes()[:2000]}

    def make(number):
        path = CLIPS[number % len(CLIPS)]
        data = bad.get(f"clip-{number:02d}", path.read_bytes())
        (tmp_path / "clip").write_bytes(data)
        return Sample(metadata(number), (), VideoFile(path.suffix[1:], (tmp_path / "clip").open("rb"), len(data)))

    folder.mkdir()
    write_samples(folder, {"payload": "video"}, make)
    config_ = stream_of(root, sources=[{"path": folder}])
    (found,) = read_all(*open_maker(config_, folder=tmp_path / "record"), range(1))
    failures = read_failures(tmp_path / "record")
    assert {f.place.split(" ")[1]: f.cause for f in failures} == dict.fromkeys(bad, "decode")
    assert [found.keys[row] for row in (0, 3)] == [expected.keys[row] for row in (0, 3)]
    assert found.num_quarantined == 2
    assert found.valid_B.all()


@pytest.mark.parametrize("policy", ["headtail", pytest.param("uniform", marks=pytest.mark.slow)])
def test_stored_videos_give_the_batches_of_stored_frames(root, tmp_path, policy):
    """The same frames on the same grid; pixels differ by the JPEG between, and by where they are made smaller."""

    def make(number):
        with CLIPS[number % len(CLIPS)].open("rb") as file:
            clip = sparse_frames(file, FRAMES)
        return Sample(metadata(number, clip.timestamps_s), tuple(encode_jpeg(one, 95, "444") for one in clip.frames))

    folder = tmp_path / "frames"
    folder.mkdir()
    write_samples(folder, {"payload": "frames", "frames": {"size": 64, "resize": "square"}}, make)
    changes = {"frames": policy, "crop_scale": 1.0, "flip_probability": 0.5}
    videos = read_all(*open_maker(stream_of(root, **changes)), range(3))
    frames = read_all(*open_maker(stream_of(root, sources=[{"path": folder}], **changes)), range(3))
    moved = 0.0
    for video, stored in zip(videos, frames, strict=True):
        difference = (video.frames_BTHWC.float() - stored.frames_BTHWC.float()).abs()
        assert difference.mean() < 2.5
        assert difference.mean(dim=(2, 3, 4)).max() < 6
        later = stored.frames_BTHWC.roll(1, dims=1).float()
        moved += float((video.frames_BTHWC.float() - later).abs().mean()) / 3
        assert (video.keys, video.captions) == (stored.keys, stored.captions)
        for name in ("ids_BL", "mlm_ids_BL", "boxes_B4", "video_id_B", "text_id_B", "noise_B2N"):
            assert torch.equal(getattr(video, name), getattr(stored, name)), name
    # Other frames of the clip, or mirrored ones, would be far off.
    assert moved > 10
