"""A planned shard, made in this process from real files by real media processes."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media_files import constant_rate, write_image, write_video

from alpro_sharding.assign import PlannedShard
from alpro_sharding.entities import EntityConfig, noun_options
from alpro_sharding.filters import FilterConfig
from alpro_sharding.media_messages import LimitConfig, MediaAnswer, MediaMember, MediaOptions
from alpro_sharding.reasons import count_reasons, describe_reasons
from alpro_sharding.results import Failure, ShardResult
from alpro_sharding.worker import ShardTask, make_shard, sample_of
from alpro_stream.errors import ShardError
from alpro_stream.manifest import ManifestRow
from alpro_stream.media import FetchConfig, FrameConfig, SourceInfo, VideoConfig
from alpro_stream.shards import DatasetInfo, ShardReader, save_dataset_info


def options(**changes):
    values = {
        "payload": "frames",
        "frames": FrameConfig(fps=3, max_frames=5, size=32),
        "video": VideoConfig(),
        "filters": FilterConfig(),
        "fetch": FetchConfig(),
        "limits": LimitConfig(),
    }
    return MediaOptions(**{**values, **changes})


def task_of(tmp_path, *files, kind="video", retry=False, **changes):
    rows = tuple(
        ManifestRow(f"id/{line}", name, (f"dog number {line}",), (), None, None, "train", kind, line)
        for line, name in enumerate(files, 1)
    )
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return ShardTask(
        planned=PlannedShard("train", kind, 0, rows),
        media_root=str(tmp_path),
        directory=out,
        note=out / "result.json",
        options=options(**changes),
        nouns=noun_options(EntityConfig(tagger="pattern")),
        retry=retry,
    )


def open_shard(result, directory):
    info = DatasetInfo.of_shards("train", {}, [result.shard])
    save_dataset_info(Path(directory), info)
    return ShardReader(directory)


def test_videos_become_samples(tmp_path):
    write_video(tmp_path / "a.mp4", constant_rate(10, 10))
    write_video(tmp_path / "b c ü.webm", constant_rate(30, 10), codec="libvpx-vp9")
    task = task_of(tmp_path, "a.mp4", "b c ü.webm")
    result = make_shard(task)
    assert (result.num_rows, result.failures, result.shard.num_samples) == (2, (), 2)
    assert result.nouns == {"dog": 2}
    assert ShardResult.from_json(task.note.read_bytes()) == result
    shards = open_shard(result, task.directory)
    metadata = shards.metadata("video-000000", 1)
    assert (metadata.key, metadata.id) == ("id_x2f_2", "id/2")
    assert metadata.source["media"] == "b c ü.webm"
    assert (metadata.source["width"], metadata.source["codec"], metadata.source["num_frames"]) == (64, "vp9", 30)
    # nine grid times, thinned to five
    assert metadata.frame_timestamps_s == (0.0, 0.6, 1.3, 2.0, 2.6)
    assert len(shards.frame_members("video-000000", 1)) == 5


def test_images_become_samples_of_one_frame(tmp_path):
    write_image(tmp_path / "a.png")
    task = task_of(tmp_path, "a.png", kind="image")
    result = make_shard(task)
    metadata = open_shard(result, task.directory).metadata("image-000000", 0)
    assert (metadata.kind, metadata.frame_timestamps_s) == ("image", (0.0,))
    assert (metadata.source["width"], metadata.source["duration_s"]) == (40, None)


def test_rows_that_fail_leave_the_others(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 96, 128, 3), np.uint8)
    write_video(tmp_path / "good.mp4", constant_rate(10, 10))
    damaged = write_video(tmp_path / "damaged.mp4", constant_rate(40, 10), width=128, height=96, pixels=noise)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    damaged.write_bytes(data)
    (tmp_path / "text.mp4").write_text("text")
    task = task_of(tmp_path, "text.mp4", "damaged.mp4", "good.mp4", "none.mp4")
    result = make_shard(task)
    assert [(f.line, f.id, f.media, f.stage) for f in result.failures] == [
        (1, "id/1", "text.mp4", "probe"),
        (2, "id/2", "damaged.mp4", "decode"),
        (4, "id/4", "none.mp4", "probe"),
    ]
    assert result.failures[1].reason.startswith("decoding failed after ")
    assert result.shard.num_samples == 1
    assert result.nouns == {"dog": 1}


def test_a_shard_without_samples_is_no_file(tmp_path):
    task = task_of(tmp_path, "none.mp4")
    result = make_shard(task)
    assert result.shard is None
    assert [path.name for path in task.directory.iterdir()] == ["result.json"]


def test_making_a_shard_again_gives_the_same_bytes(tmp_path):
    write_video(tmp_path / "a.mp4", constant_rate(10, 10))
    task = task_of(tmp_path, "a.mp4", "none.mp4")
    first = make_shard(task)
    tar = (task.directory / "video-000000.tar").read_bytes()
    again = make_shard(task)
    assert (again.shard, again.failures, again.nouns) == (first.shard, first.failures, first.nouns)
    assert (task.directory / "video-000000.tar").read_bytes() == tar


def test_a_target_that_is_gone_is_an_error(tmp_path):
    write_video(tmp_path / "a.mp4", [0])
    task = task_of(tmp_path, "a.mp4")
    task.directory.rmdir()
    with pytest.raises(ShardError, match="cannot write"):
        make_shard(task)


def test_reasons_are_counted_without_what_differs_between_rows():
    failures = [
        Failure(1, None, None, "manifest", "duplicate id 'a': first used on line 7"),
        Failure(2, None, None, "decode", "decoding failed after 3 frames: end"),
        Failure(3, None, None, "decode", "decoding failed after 78 frames: end"),
    ]
    counts = count_reasons(failures)
    assert list(counts.items()) == [
        ("decode: decoding failed after … frames: end", 2),
        ("manifest: duplicate id …: first used on line …", 1),
    ]
    assert count_reasons([Failure(4, None, None, "manifest", "'kind' is 'mp3', an mp4")]) == {
        "manifest: 'kind' is …, an mp4": 1
    }
    assert describe_reasons(counts).startswith("2 x decode: ")
    assert describe_reasons({f"reason {i}": 2 for i in range(12)}).endswith("; 4 for other reasons")


def test_samples_of_a_tar_that_was_damaged_are_made_again(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), np.uint8)
    write_video(tmp_path / "a.mp4", constant_rate(10, 10), pixels=noise)
    files = ("a.mp4", "b.mp4")
    make_shard(task_of(tmp_path, *files))
    tar = tmp_path / "out" / "video-000000.tar"
    data = bytearray(tar.read_bytes())
    middle = data.index(b"\xff\xd8") + 400  # inside of a frame, whose beginning and end stay
    data[middle : middle + 9] = b"unhealthy"
    tar.write_bytes(data)
    write_video(tmp_path / "b.mp4", constant_rate(10, 10))
    mended = make_shard(task_of(tmp_path, *files, retry=True))
    made = tar.read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert make_shard(task_of(tmp_path, *files)).shard == mended.shard
    assert tar.read_bytes() == made


def test_samples_of_a_tar_that_lost_its_note_are_taken_over(tmp_path):
    write_video(tmp_path / "a.mp4", constant_rate(10, 10))
    task = task_of(tmp_path, "a.mp4")
    first = make_shard(task)
    task.note.unlink()
    (tmp_path / "a.mp4").unlink()
    assert make_shard(task).shard == first.shard


def test_what_may_be_secret_in_an_address_is_not_published(tmp_path):
    place = "https://127.0.0.1:1/clip.mp4?X-Amz-Signature=SECRET"
    quick = options(fetch=FetchConfig(attempts=1, timeout_s=1))
    task = task_of(tmp_path, place)
    result = make_shard(replace(task, options=quick))
    assert result.failures[0].media == "https://127.0.0.1:1/clip.mp4"
    assert b"SECRET" not in task.note.read_bytes()
    buffer = (tmp_path / "frame").open("w+b")
    buffer.write(b"jpeg")
    buffer.flush()
    answer = MediaAnswer(
        members=(MediaMember("000.jpg", buffer.fileno(), 0, 4),),
        timestamps_s=(0.0,),
        source=SourceInfo(4, 4, "h264", 1.0, 3),
        sha256="ab",
        sampling="exact",
        fetch_s=0.0,
        decode_s=0.0,
    )
    metadata = sample_of(task.planned.rows[0], ("a dog",), answer).metadata
    assert metadata.source["media"] == "https://127.0.0.1:1/clip.mp4"
    assert metadata.source["sampling"] == "exact"
