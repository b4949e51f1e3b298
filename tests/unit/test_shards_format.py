"""What is written is what any tar reader, WebDataset and DALI read."""

import contextlib
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_files import make_sample, write_shard

from alpro_stream.errors import ShardError
from alpro_stream.shards import Member, Sample, ShardIndex, ShardWriter, index_tar, write_index
from alpro_stream.shards.index import format_index

SAMPLES = [make_sample("a", 3), make_sample("b", 1), make_sample("c", 12)]


def test_tar_lists_members_in_order(tmp_path):
    write_shard(tmp_path, samples=SAMPLES[:2])
    listed = subprocess.run(["tar", "tf", tmp_path / "video-000000.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [
        "a.json",
        "a.txt",
        "a.000.jpg",
        "a.001.jpg",
        "a.002.jpg",
        "b.json",
        "b.txt",
        "b.000.jpg",
    ]


def test_the_tar_is_plain_ustar_without_times_and_owners(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    with tarfile.open(tmp_path / "video-000000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.pax_headers) == (0, 0, 0, "", {})
            assert info.type == tarfile.REGTYPE


def test_metadata_and_caption(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    with tarfile.open(tmp_path / "video-000000.tar") as tar:
        fields = json.load(tar.extractfile("b.json"))
        assert tar.extractfile("b.txt").read().decode() == "a dog runs"
    assert fields == {
        "id": "id of b",
        "captions": ["a dog runs", "ein Hund läuft"],
        "qa": [{"question": "what runs", "answer": "a dog"}],
        "kind": "video",
        "frame_timestamps_s": [0.0],
        "source": {
            "media": "b.mp4",
            "width": 64,
            "height": 48,
            "codec": "h264",
            "duration_s": 1.0,
            "num_frames": 30,
            "start_s": None,
            "end_s": None,
        },
    }


def test_the_index_says_where_each_member_lies(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    index = ShardIndex.load(tmp_path / "video-000000.idx")
    data = (tmp_path / "video-000000.tar").read_bytes()
    assert [index.key(slot) for slot in range(len(index))] == ["a", "b", "c"]
    assert [index.num_frames(slot) for slot in range(3)] == [3, 1, 12]
    for slot, sample in enumerate(SAMPLES):
        for member, (extension, size, content) in zip(index.members(slot), sample.members(), strict=True):
            assert member.extension == extension
            assert member.name == f"{sample.metadata.key}.{extension}"
            assert data[member.offset : member.offset + member.size] == content.read()
            assert member.size == size
            assert member.offset % 512 == 0


def test_the_index_equals_the_one_dalis_tool_makes(tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    write_shard(tmp_path, samples=SAMPLES)
    with wds2idx.IndexCreator(str(tmp_path / "video-000000.tar"), str(tmp_path / "dali.idx"), verbose=False) as creator:
        creator.create_index()
    ours, theirs = (tmp_path / name for name in ("video-000000.idx", "dali.idx"))
    assert ours.read_text() == theirs.read_text()


def test_an_index_made_from_the_tar_is_the_same(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    write_index(tmp_path / "again.idx", index_tar(tmp_path / "video-000000.tar"))
    assert (tmp_path / "again.idx").read_bytes() == (tmp_path / "video-000000.idx").read_bytes()


def test_a_foreign_tar_is_grouped_by_key(tmp_path):
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name in ("sub/a.jpg", "sub/a.txt", "b.jpg", ".hidden", "README", "b.cls.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"xy"))
    groups = index_tar(tmp_path / "foreign.tar")
    assert [[member.extension for member in group] for group in groups] == [["jpg", "txt"], ["jpg", "cls.txt"]]
    with pytest.raises(ShardError, match="cannot be read as a tar"):
        index_tar(tmp_path / "none.tar")


def test_a_tar_that_is_not_whole_has_no_index(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    path = tmp_path / "video-000000.tar"
    data = path.read_bytes()
    members = [member for sample in index_tar(path) for member in sample]
    last = members[-1]
    end = last.offset + -(-last.size // 512) * 512
    for size in (
        0,
        1,
        511,
        512,
        members[4].offset,
        members[4].offset + 1,
        last.offset - 512,
        last.offset - 1,
        end - 1,
        end,
    ):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"video-000000\.tar is cut off or damaged|is cut off at byte"):
            index_tar(path)
    for member in (members[0], members[5], last):
        for damage in (b"\xff" * 8, bytes(512)):  # a flipped name, and a block that was lost
            start = member.offset - 512
            path.write_bytes(data[:start] + damage + data[start + len(damage) :])
            with pytest.raises(ShardError, match=r"is (cut off or )?damaged"):
                index_tar(path)
    path.write_bytes(data + data)  # two tars behind each other, of which readers see the first one
    with pytest.raises(ShardError, match="files follow what looks like its end"):
        index_tar(path)


@pytest.mark.parametrize("compressed", ["gz", "bz2", "xz"])
def test_a_compressed_tar_has_no_index(tmp_path, compressed):
    with tarfile.open(tmp_path / "a.tar", f"w:{compressed}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardError, match=r"a\.tar is compressed \(\w+\), so that .* unpack it to a plain .tar"):
        index_tar(tmp_path / "a.tar")


def test_indexes_take_little_memory():
    import tracemalloc

    names = ["json", "txt", *(f"{number:03d}.jpg" for number in range(21))]
    samples = [
        [
            Member(name, slot * 400_000 + i * 15_360, 15_000 + i, f"clip_{slot:06d}.{name}")
            for i, name in enumerate(names)
        ]
        for slot in range(1000)
    ]
    data = format_index(samples)
    tracemalloc.start()
    try:
        indexes = [ShardIndex(data, "x") for _ in range(16)]
        size = tracemalloc.get_traced_memory()[0] / len(indexes)
    finally:
        tracemalloc.stop()
    assert 128 * size < 130e6  # of text they are 126 MB
    assert [indexes[0].members(slot) for slot in range(1000)] == [tuple(members) for members in samples]


def test_webdataset_reads_a_shard(tmp_path):
    write_shard(tmp_path, samples=SAMPLES)
    read = list(webdataset.WebDataset(str(tmp_path / "video-000000.tar"), shardshuffle=False))
    assert [sample["__key__"].rpartition("/")[2] for sample in read] == ["a", "b", "c"]
    assert read[2]["011.jpg"] == SAMPLES[2].frames[11]
    assert read[0]["txt"] == b"a dog runs"


def test_dalis_own_reader_reads_shard_and_index(tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    write_shard(tmp_path, samples=SAMPLES)

    @dali.pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def pipeline():
        jpeg, text = dali.fn.readers.webdataset(
            paths=[str(tmp_path / "video-000000.tar")],
            index_paths=[str(tmp_path / "video-000000.idx")],
            ext=["000.jpg", "txt"],
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(jpeg), text

    built = pipeline()
    built.build()
    images, texts = built.run()
    assert bytes(np.array(texts.at(1))).decode() == "a dog runs"
    for slot, sample in enumerate(SAMPLES):
        expected = np.asarray(Image.open(io.BytesIO(sample.frames[0])))
        np.testing.assert_allclose(np.array(images.at(slot)), expected, atol=2)


def test_equal_samples_give_equal_bytes(tmp_path):
    first, second = write_shard(tmp_path / "1", samples=SAMPLES), write_shard(tmp_path / "2", samples=SAMPLES)
    assert first == second
    assert (first.num_samples, first.num_captions, first.num_questions) == (3, 6, 3)
    assert first.num_bytes == (tmp_path / "1" / "video-000000.tar").stat().st_size
    for suffix in ("tar", "idx"):
        paths = [tmp_path / folder / f"video-000000.{suffix}" for folder in "12"]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_digests_are_those_of_the_files(tmp_path):
    info = write_shard(tmp_path, samples=SAMPLES)
    for suffix, digest in (("tar", info.sha256), ("idx", info.index_sha256)):
        path = tmp_path / f"video-000000.{suffix}"
        listed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert listed.stdout.split()[0] == digest


def test_an_abandoned_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path, "video-000000", "video")
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.add(SAMPLES[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_the_shard_is_complete(tmp_path):
    with ShardWriter(tmp_path, "video-000000", "video") as writer:
        writer.add(SAMPLES[0])
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video-000000.idx", "video-000000.tar"]


def test_what_does_not_belong_into_a_shard_is_refused(tmp_path):
    with ShardWriter(tmp_path, "video-000000", "video") as writer:
        writer.add(make_sample("a"))
        with pytest.raises(ShardError, match="two samples with the key a"):
            writer.add(make_sample("a"))
        with pytest.raises(ShardError, match="of kind image, the shard of video"):
            writer.add(make_sample("b", kind="image"))
        writer.abort()
    with pytest.raises(ShardError, match="needs at least one sample"):
        ShardWriter(tmp_path, "video-000001", "video").close()
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"cannot write .*none/video-000000.tar: No such file"):
        ShardWriter(tmp_path / "none", "video-000000", "video")


def test_a_full_disk_is_an_error_and_leaves_nothing_visible(tmp_path):
    writer = ShardWriter(tmp_path, "video-000000", "video")
    writer._file._raw = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(ShardError, match="No space left on device"):
        writer.add(SAMPLES[0])
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_sample_needs_one_timestamp_a_frame():
    metadata = make_sample("a", 3).metadata
    with pytest.raises(ValueError, match="1 frames with 3 timestamps"):
        Sample(metadata, (b"x",))
    with pytest.raises(ValueError, match="0 frames"):
        Sample(metadata, ())
