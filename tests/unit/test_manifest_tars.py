import io
import json
import tarfile

import pytest
from shard_files import write_shard

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import ManifestConfig, ManifestRow, RejectedRow, media_root, read_manifest

VIDEO = b"not a real video, but these bytes are asked for again"


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            data = json.dumps(data).encode() if isinstance(data, dict) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, extension="mp4", data=VIDEO, caption=None, metadata=None):
    members = [(f"{key}.{extension}", data), (f"{key}.txt", (caption or f"caption of {key}").encode())]
    return [*members, (f"{key}.json", metadata)] if metadata else members


def read(path, **config):
    return list(read_manifest(path, ManifestConfig(**config)))


def medium(root, row):
    offset, size = row.byte_range
    return (root / row.media).read_bytes()[offset : offset + size]


def test_samples_of_a_folder_of_tars(tmp_path):
    metadata = {
        "caption": "of json",
        "url": "https://x/7",
        "key": "other",
        "id": "other",
        "license": "CC0",
        "split": "x",
    }
    write_tar(tmp_path / "00001.tar", sample("b/000000003", "webm", b"third") + sample("4", "MKV"))
    write_tar(
        tmp_path / "00000.tar", sample("000000001", data=b"first", metadata=metadata) + sample("2", "jpg", b"pic")
    )
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").touch()
    rows = read(tmp_path)
    assert [(row.id, row.media, row.kind, row.line, row.captions) for row in rows] == [
        ("000000001", "00000.tar", "video", 1, ("caption of 000000001",)),
        ("2", "00000.tar", "image", 2, ("caption of 2",)),
        ("b/000000003", "00001.tar", "video", 3, ("caption of b/000000003",)),
        ("4", "00001.tar", "video", 4, ("caption of 4",)),
    ]
    assert (rows[0].license, rows[0].split) == ("CC0", "train")
    assert [medium(tmp_path, row) for row in rows] == [b"first", b"pic", b"third", VIDEO]
    assert media_root(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("0000{2,0}.tar", ["00002.tar", "00000.tar"]),
        ("*.tar", ["00000.tar", "00001.tar", "00002.tar", "00010.tar"]),
        ("00001.tar", ["00001.tar"]),
        ("{00001..00002}*.tar", ["00001.tar", "00002.tar"]),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, names):
    for number in (10, 2, 1, 0):
        write_tar(tmp_path / "tars" / f"{number:05d}.tar", sample(str(number)))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "tars" / pattern, f"tars/{pattern}"):
        assert [row.media for row in read(path)] == names
        assert media_root(path) == str(tmp_path / "tars")


def test_patterns_over_folders(tmp_path):
    for part in "ab":
        write_tar(tmp_path / part / "0.tar", sample("k"))
    rows = read(tmp_path / "{a,b}" / "0.tar", columns={"id": "{media}/{key}"})
    assert [(row.id, medium(tmp_path, row)) for row in rows] == [("a/0.tar/k", VIDEO), ("b/0.tar/k", VIDEO)]
    assert [row.id for row in read(tmp_path / "a", columns={"id": "{tar}-{key}"})] == ["0-k"]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_formats(tmp_path, format_):
    key = "/".join(["part"] * 18) + "/" + "n" * 80
    path = write_tar(tmp_path / "a.tar", sample(key, data=b"long") + sample("s"), format=format_)
    first, second = read(path)
    assert (first.id, medium(tmp_path, first), second.id) == (key, b"long", "s")


def test_captions_come_from_text_then_metadata(tmp_path):
    members = [
        ("a.mp4", VIDEO), ("a.json", {"caption": "one"}),
        ("b.mp4", VIDEO), ("b.json", {"caption": ["one", "two"]}),
        ("c.mp4", VIDEO), ("c.json", {"captions": ["three"], "caption": "x", "title": "a title"}),
        ("d.mp4", VIDEO), ("d.txt", b"two\nlines"), ("d.json", {"caption": "x"}),
        ("e.txt", b"before the medium"), ("e.mp4", VIDEO),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    captions = [row.captions for row in read(path)]
    assert captions == [("one",), ("one", "two"), ("three",), ("two lines",), ("before the medium",)]
    titled = read(path, columns={"captions": ["captions", "title"]})
    assert titled[2].captions == ("three", "a title")


def test_samples_are_told_apart_by_the_whole_key(tmp_path):
    keys = ["12", "1", "a/1", "b/1", "b/1-2"]
    path = write_tar(tmp_path / "a.tar", [member for key in keys for member in sample(key, data=key.encode())])
    assert [(row.id, medium(tmp_path, row).decode()) for row in read(path)] == [(key, key) for key in keys]


def test_a_picture_beside_a_video_is_no_medium_of_its_own(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"thumb"), ("a.mp4", VIDEO), ("a.m4a", b"sound"), ("a.txt", b"c")])
    (row,) = read(path)
    assert (row.kind, medium(tmp_path, row)) == ("video", VIDEO)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"a dog")], "no video or image in t.tar: it has a.txt"),
        ([("a.mp4", VIDEO)], "no caption"),
        ([("a.mp4", VIDEO), ("a.json", {"caption": None})], "no caption"),
        ([("a.mp4", VIDEO), ("a.json", b"{")], "its .json is not JSON: "),
        ([("a.mp4", VIDEO), ("a.txt", b"\xff")], "its .txt is not UTF-8 (byte 0) (in t.tar)"),
        ([("a.mp4", VIDEO), ("a.txt", b"x" * 10_000_000)], "its .txt is longer than"),
    ],
)
def test_a_sample_that_lacks_something_is_rejected(tmp_path, members, reason):
    rejected, row = read(write_tar(tmp_path / "t.tar", members + sample("b")))
    assert isinstance(rejected, RejectedRow)
    assert (rejected.line, rejected.id) == (1, "a")
    assert reason in rejected.reason
    assert (row.id, row.line) == ("b", 2)


def test_what_is_no_file_belongs_to_no_sample(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, type_ in (("dir.x", tarfile.DIRTYPE), ("link.mp4", tarfile.SYMTYPE), ("dev.mp4", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "/etc/passwd"
            tar.addfile(info)
        for name in ("README", ".hidden.mp4", "a.mp4", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [row.id for row in read(path)] == ["a"]


def test_a_tar_may_be_cut_off_anywhere(tmp_path):
    good = write_tar(tmp_path / "good.tar", sample("a") + sample("b") + sample("c"))
    data = good.read_bytes()
    end_of_files = 6 * 1024  # six members of a header and a block; then zeros
    path = tmp_path / "cut.tar"
    for size in range(0, end_of_files, 256):
        path.write_bytes(data[:size])
        *rows, last = read(path)
        assert isinstance(last, RejectedRow), size
        assert last.reason.startswith("cut.tar is cut off"), size
        # A sample is whole when the first member of the next one is there.
        assert [row.id for row in rows] == ["a", "b", "c"][: max(0, (size - 512 - len(VIDEO)) // 2048)], size
        assert all(isinstance(row, ManifestRow) for row in rows)
        assert last.line == len(rows) + 1


def test_damage_in_one_tar_leaves_the_others(tmp_path):
    first = write_tar(tmp_path / "0.tar", sample("a") + sample("b"))
    write_tar(tmp_path / "1.tar", sample("c"))
    (tmp_path / "2.tar").write_bytes(b"this is no tar" * 100)
    (tmp_path / "3.tar").touch()
    data = bytearray(first.read_bytes())
    data[2048:2060] = b"\xff" * 12  # in the header of b.mp4
    first.write_bytes(data)
    rows = [(row.line, row.id if isinstance(row, ManifestRow) else row.reason[:35]) for row in read(tmp_path)]
    assert rows == [
        (1, "0.tar is cut off or damaged at byte"),
        (2, "c"),
        (3, "2.tar is cut off or damaged behind "),
        (4, "3.tar is cut off or damaged behind "),
    ]


@pytest.mark.parametrize("payload", ["frames", "video"])
def test_our_own_shards_are_refused(tmp_path, payload):
    if payload == "frames":
        write_shard(tmp_path / "train")
    else:
        ours = {"id": "a", "captions": ["c"], "qa": [], "kind": "video", "frame_timestamps_s": [], "source": {}}
        write_tar(tmp_path / "train" / "video-000000.tar", [("a.json", ours), ("a.txt", b"c"), ("a.mp4", VIDEO)])
    with pytest.raises(ManifestError, match=r"tar is a shard that `alpro shard` made"):
        read(tmp_path / "train")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz"):
        pass
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ManifestError, match=r"is compressed \(gzip\).*unpack it"):
            read(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.tar", "no such tar"),
        ("{0..3}.tar", "no such tar: .*1.tar"),
        ("x*.tar", "names no file"),
        ("{3..0}.tar", "names no file"),
    ],
)
def test_tars_that_are_not_there_are_an_error(tmp_path, path, message):
    write_tar(tmp_path / "0.tar", sample("a"))
    with pytest.raises(ManifestError, match=message):
        read(tmp_path / path)


def test_an_empty_folder_is_no_corpus_of_tars(tmp_path):
    with pytest.raises(ManifestError, match="holds no tars"):
        read(tmp_path, format="webdataset")


def test_a_tar_of_many_members_takes_no_memory(tmp_path):
    import tracemalloc

    path = write_tar(tmp_path / "a.tar", [member for number in range(2000) for member in sample(f"{number:06d}")])
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_manifest(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
