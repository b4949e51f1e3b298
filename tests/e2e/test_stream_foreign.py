"""Training on tars that other tools wrote: the right captions with the right media, and nothing touched."""

import io
import itertools
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "resume"))

from dying_runs import config, metrics_of
from stream_parts import IMAGE_SIZE, NUM_FRAMES, assert_batches_equal, open_maker, read_all, stream_config

from alpro_sharding import ShardConfig
from alpro_sharding.index_in_place import index_in_place
from alpro_stream.config import validate
from alpro_stream.errors import ShardError
from alpro_stream.run import train
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.quarantine import read_failures
from alpro_stream.testing.shards import caption_of, write_tokenizer

VIDEOS = Path(__file__).resolve().parents[2] / "examples/clips/videos"
CLIPS = [(VIDEOS / name).read_bytes() for name in ("v053.mp4", "v015.mp4")]
SHARDS = (5, 6, 1)


def key_of(number):
    return f"{number:09d}"


def shade(number):
    return 20 * number + 10


def picture(number, size=(60, 40)):
    """A picture of one shade, by which a sample is known again."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade(number),) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def image_sample(number):
    """As img2dataset writes it."""
    return {
        "__key__": key_of(number),
        "jpg": picture(number),
        "txt": caption_of(number),
        "json": {"caption": caption_of(number), "url": f"https://x/{number}.jpg", "width": 60, "height": 40},
    }


def video_sample(number):
    """As video2dataset writes it."""
    return {
        "__key__": key_of(number),
        "mp4": CLIPS[number % len(CLIPS)],
        "txt": caption_of(number),
        "json": {"url": f"https://x/{number}", "clips": [[0.0, 5.0]]},
    }


def write_tars(folder, make, sizes=SHARDS):
    folder.mkdir(parents=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in itertools.islice(numbers, size):
                writer.write(make(number))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def write_raw(folder, members, name="00000.tar"):
    """A tar of (name, contents) as they are; in place of contents a type of what is no file, which leads outside."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            if len(data) == 1:
                info.type, info.linkname, data = data, "../outside", b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture
def root(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def batches_of(root, steps, **changes):
    values = {"global_batch": 4, "num_lanes": 2, "crop_scale": 1.0, **changes}
    return read_all(*open_maker(stream_config(root, **values)), range(steps))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_pairs_are_right(batches):
    """Each key with its caption and its picture."""
    for batch in batches:
        for key, caption, frames in zip(batch.keys, batch.captions, batch.frames_BTHWC, strict=True):
            number = int(key)
            assert caption == caption_of(number)
            assert abs(int(frames.float().mean()) - shade(number)) <= 2


def test_images_with_and_without_an_index_are_the_same_stream(root):
    folder = write_tars(root / "train", image_sample)
    before = contents(folder)
    loose = batches_of(root, 6)
    assert contents(folder) == before
    assert_pairs_are_right(loose)
    for start in (0, 3):
        keys = [key for batch in loose[start : start + 3] for key in batch.keys]
        assert sorted(keys) == [key_of(number) for number in range(12)]
    options = {"manifest": str(folder), "out": str(folder), "in_place": True, "payload": "video"}
    index_in_place(validate(ShardConfig, {**options, "entities": {"tagger": "pattern"}}, "test"))
    assert (folder / "dataset.json").exists()
    for batch, other in zip(batches_of(root, 6), loose, strict=True):
        assert_batches_equal(batch, other)
    # Indexes that get lost are made again in memory.
    for path in folder.glob("*.idx"):
        path.unlink()
    for batch, other in zip(batches_of(root, 6), loose, strict=True):
        assert_batches_equal(batch, other)


def test_a_run_on_tars_of_videos(root):
    folder = write_tars(root / "train", video_sample)
    before = contents(folder)
    changes = {
        "stream.sources": [{"path": str(folder)}],
        "stream.global_batch": 4,
        "stream.num_lanes": 2,
        "stream.video": {"fps": 2, "max_frames": 4, "size": 64},
        "train.max_steps": 4,
    }
    train(config(root, root / "run", **changes))
    lines = metrics_of(root / "run")
    assert [line["quarantined"] for line in lines] == [0] * 4
    assert all(line["loss/vtc"] > 0 for line in lines)
    assert contents(folder) == before
    (first, *_) = batches_of(root, 1, video=changes["stream.video"])
    assert first.kind == "video"
    assert first.frames_BTHWC.shape == (4, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.captions == tuple(caption_of(int(key)) for key in first.keys)


def test_videos_and_images_of_one_folder_are_two_sources(root):
    folder = write_tars(root / "train", image_sample, (8,))
    with webdataset.TarWriter(str(folder / "00001.tar")) as writer:
        for number in range(8):
            writer.write(video_sample(number))
    batches = batches_of(root, 4, video={"fps": 2, "max_frames": 4, "size": 64})
    assert sorted(batch.kind for batch in batches) == ["image", "image", "video", "video"]
    assert_pairs_are_right([batch for batch in batches if batch.kind == "image"])


@pytest.mark.parametrize("name", ["00001.tar.gz", "00001.tar"])
def test_compressed_tars_are_refused_before_anything_begins(root, name):
    folder = write_tars(root / "train", image_sample)
    (folder / "00001.tar").unlink()
    with tarfile.open(folder / name, "w:gz") as tar:
        tar.add(folder / "00000.tar", "000.jpg")
    run = config(root, root / "run", **{"stream.sources": [{"path": str(folder)}]})
    with pytest.raises(ShardError, match=rf"{name} is compressed \(gzip\).*; unpack it to a plain .tar"):
        train(run)
    assert not metrics_of(root / "run")


def pairs(*numbers):
    return [
        (f"{key_of(number)}.{extension}", data)
        for number in numbers
        for extension, data in (("jpg", picture(number)), ("txt", caption_of(number).encode()))
    ]


def test_members_that_lie_apart_are_never_paired(root):
    members = pairs(*range(4))
    unordered = [*members[::2], *members[1::2]]
    write_raw(root / "train", unordered)
    with pytest.raises(ShardError, match=r"00000\.tar: members of a sample must follow each other.*sorted by name"):
        batches_of(root, 1)


def test_what_cannot_be_paired_is_left_out_and_the_others_keep_their_captions(root, caplog):
    doubtful = [
        *pairs(0), ("000000000.jpg", picture(9)),  # which of the two?
        ("000000001.jpg", picture(1)),  # no caption
        ("000000002.txt", b"no picture"),
        ("000000003.jpg", tarfile.SYMTYPE), ("000000003.txt", b"a link"),
        ("folder", tarfile.DIRTYPE), ("folder/x.jpg", tarfile.LNKTYPE),
    ]  # fmt: skip
    write_raw(root / "train", [*pairs(4), *doubtful, *pairs(5, 6, 7)])
    (root / "outside").mkdir()
    before = contents(root)
    batches = batches_of(root, 2)
    assert_pairs_are_right(batches)
    assert sorted(batches[0].keys) == sorted(batches[1].keys) == [key_of(number) for number in range(4, 8)]
    assert contents(root) == before
    assert "4 samples in 1 tars" in caplog.text


def test_names_that_lead_outside_are_read_and_nothing_is_written(root):
    names = ["/etc/{}", "../../{}", "a/../{}", "./b/{}"]
    members = [
        (f"{names[number].format(key_of(number))}.{extension}", data)
        for number in range(4)
        for extension, data in (("jpg", picture(number)), ("txt", caption_of(number).encode()))
    ]
    write_raw(root / "deep/train", members)
    before = contents(root)
    batches = batches_of(root, 2, sources=[{"path": root / "deep/train"}])
    assert_pairs_are_right(batches)
    assert sorted(batches[0].keys) == [key_of(number) for number in range(4)]
    assert contents(root) == before


def test_a_picture_that_is_damaged_is_replaced_as_any_other(root):
    members = dict(pairs(*range(7)))
    members[f"{key_of(2)}.jpg"] = picture(2)[:200]
    members[f"{key_of(5)}.jpg"] = b"no picture at all"
    write_raw(root / "train", list(members.items()))
    settings = stream_config(root, global_batch=4, num_lanes=2, crop_scale=1.0)
    batches = read_all(*open_maker(settings, folder=root / "record"), range(6))
    assert_pairs_are_right(batches)
    failures = read_failures(root / "record")
    assert {failure.place: failure.cause for failure in failures} == {
        f"00000:{number} {key_of(number)}": "decode" for number in (2, 5)
    }
    assert not {key_of(2), key_of(5)} & {key for batch in batches for key in batch.keys}


def test_frames_that_are_not_square_are_cut_and_made_square(root):
    """Two halves of the frame, left dark and right bright, in frames of several shapes."""

    def frame(width, height):
        pixels = np.full((height, width, 3), 30, np.uint8)
        pixels[:, width // 2 :] = 220
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        return file.getvalue()

    (root / "train").mkdir()
    shapes = [(96, 64), (64, 96), (64, 64), (128, 64)]
    with ShardWriter(root / "train", "video-000000", "video") as writer:
        for number in range(8):
            metadata = SampleMetadata(key_of(number), "x", (caption_of(number),), (), "video", (0.0, 1.0), {})
            writer.add(Sample(metadata, (frame(*shapes[number % 4]),) * 2))
        info = writer.close()
    options = {"payload": "frames", "frames": {"size": 64, "resize": "short_side"}}
    save_dataset_info(root / "train", DatasetInfo.of_shards("train", options, [info]))
    for crop_scale, least in ((1.0, IMAGE_SIZE // 2), (0.75, IMAGE_SIZE // 3 - 1)):
        batches = batches_of(root, 4, crop_scale=crop_scale, flip_probability=0.0)
        widths = set()
        for batch in batches:
            assert batch.frames_BTHWC.shape == (4, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
            dark = (batch.frames_BTHWC.float().mean(dim=(2, 4)) < 125).sum(dim=2)
            assert ((dark >= least - 1) & (dark <= IMAGE_SIZE - least + 1)).all()
            assert (dark == dark[:, :1]).all()  # one window for all frames of a clip
            widths |= set(dark.flatten().tolist())
        assert (len(widths) > 2) is (crop_scale < 1)
    assert torch.equal(
        batches[0].frames_BTHWC, batches_of(root, 1, crop_scale=0.75, flip_probability=0.0)[0].frames_BTHWC
    )
