"""Real tars, indexed where they are."""

import fcntl
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from alpro_sharding import ShardConfig
from alpro_sharding.index_in_place import NOTES_FOLDER, index_in_place
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, ManifestError, ShardError
from alpro_stream.shards import ShardReader, load_dataset_info, load_entities

VIDEO = b"not a real video, but these bytes are asked for again"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str = "a dog runs", **metadata: str) -> dict[str, bytes]:
    return {
        f"{key}.mp4": VIDEO + key.encode("utf-8", "surrogateescape"),
        f"{key}.txt": caption.encode(),
        f"{key}.json": json.dumps(metadata).encode(),
    }


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "tars"
    out.mkdir()
    write_tar(out / "00000.tar", {**sample("a", alt="a red kite"), "b.mp4": VIDEO, **sample("c", "two dogs")})
    write_tar(out / "00001.tar", {"d.txt": b"no medium", **sample("e", "a cat", alt="a kite")})
    return out


def config(out: Path, **changes) -> ShardConfig:
    values = {"manifest": str(out), "out": str(out), "in_place": True, "payload": "video", "num_workers": 2}
    values["entities"] = {"tagger": "pattern"}
    return validate(ShardConfig, {**values, **changes}, "test")


def index(out: Path, **changes):
    return index_in_place(config(out, **changes))


def index_times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.idx")}


def index_was_written(out: Path, before: dict[str, int]) -> list[str]:
    """Names of the indexes that are not as they were."""
    return sorted(name for name, time_ns in index_times(out).items() if before.get(name) != time_ns)


def failures(out: Path) -> list[tuple[str, int, str]]:
    lines = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    return [(line["manifest"], line["line"], line["id"]) for line in lines]


def test_tars_are_read_by_their_indexes_and_what_cannot_be_used_is_left_out(folder):
    before = {tar.name: tar.read_bytes() for tar in folder.glob("*.tar")}
    done = []
    summary = index_in_place(config(folder), lambda number, total: done.append((number, total)))
    assert done == [(1, 2), (2, 2)]
    assert (summary.num_rows, summary.num_samples, summary.num_failures, summary.num_shards) == (5, 3, 2, 2)
    assert sum(summary.failures_by_reason.values()) == 2
    assert failures(folder) == [("00000.tar", 2, "b"), ("00001.tar", 1, "d")]
    shards = ShardReader(folder)
    index = shards.index("00000")
    assert [index.key(slot) for slot in range(len(index))] == ["a", "c"]
    assert shards.read("00000", 1, index.members(1)[:2]) == [VIDEO + b"c", b"two dogs"]
    assert [shards.metadata("00000", slot).captions for slot in (0, 1)] == [("a dog runs",), ("two dogs",)]
    assert [shards.media_members("00000", slot)[0].name for slot in (0, 1)] == ["a.mp4", "c.mp4"]
    assert load_entities(folder / "entities.json") == [("dog", 2), ("cat", 1)]
    assert [shard.num_captions for shard in load_dataset_info(folder).shards] == [2, 1]
    assert {tar.name: tar.read_bytes() for tar in folder.glob("*.tar")} == before


def test_nothing_is_read_again_when_nothing_changed(folder):
    first = index(folder)
    before = index_times(folder)
    # Neither decides what is noted of a tar.
    again = index(folder, num_workers=1, reading={"media_root": "/elsewhere"})
    assert (first.num_shards_reused, again.num_shards_reused) == (0, 2)
    assert index_was_written(folder, before) == []
    assert (again.splits, again.num_failures, again.failures_by_reason) == (
        first.splits,
        first.num_failures,
        first.failures_by_reason,
    )
    assert len(failures(folder)) == 2


@pytest.mark.parametrize(
    ("changes", "entities"),
    [
        ({"entities": {"file": "words.txt"}}, [("two dogs", 1), ("kite", 0)]),
        ({"entities": {"tagger": "pattern", "stop_words": ["cat"]}}, [("dog", 2)]),
        ({"reading": {"columns": {"captions": "alt"}}}, [("kite", 2)]),
        ({"reading": {"split": "val"}}, [("dog", 2), ("cat", 1)]),
    ],
)
def test_options_that_decide_the_result_make_tars_be_indexed_anew(folder, monkeypatch, changes, entities):
    monkeypatch.chdir(folder.parent)
    Path("words.txt").write_text("kite\ntwo dogs\n")
    index(folder)
    before = index_times(folder)
    summary = index(folder, **changes)
    assert summary.num_shards_reused == 0
    assert index_was_written(folder, before) == ["00000.idx", "00001.idx"]
    assert load_entities(folder / "entities.json") == entities
    assert load_dataset_info(folder).split == changes.get("reading", {}).get("split", "train")


def test_captions_of_other_columns_are_those_that_are_read_later(folder):
    digests = set()
    for columns in ({}, {"captions": "alt"}, {"captions": ["captions", "alt"]}, {"question": "alt", "answer": "alt"}):
        summary = index(folder, reading={"columns": columns})
        shards = ShardReader(folder)
        for shard in shards.info.shards:
            totals = shards.counts(shard.name).sum(0).tolist()
            assert totals == [shard.num_captions, shard.num_questions]
        assert shards.info == summary.splits["train"]
        digests.add(shards.info.digest)
    assert len(digests) == 4
    index(folder, reading={"columns": {"captions": "alt"}})
    (folder / "00000.idx").unlink()
    assert ShardReader(folder).metadata("00000", 0).captions == ("a red kite",)


def test_members_of_a_sample_that_lie_apart_are_refused(folder):
    members = sample("e")
    write_tar(folder / "00001.tar", {"e.mp4": members.pop("e.mp4"), **sample("f"), **members})
    with pytest.raises(ShardError, match=r"00001\.tar: members of a sample must follow each other, .* 'e' lie apart"):
        index(folder)


def test_words_of_a_file_that_were_changed_are_counted_anew(folder):
    words = folder.parent / "words.txt"
    for word, count in (("dog", 2), ("cat", 1)):
        words.write_text(word)
        index(folder, entities={"file": str(words)})
        assert load_entities(folder / "entities.json") == [(word, count)]


def test_only_the_tar_that_changed_is_indexed_anew(folder):
    tar = folder / "00000.tar"
    index(folder)
    before, size = index_times(folder), tar.stat().st_size
    write_tar(tar, {**sample("a", alt="a red kite"), "b.mp4": VIDEO, **sample("x", "two cats")})
    assert tar.stat().st_size == size
    os.utime(tar, (1, 1))  # older than the note, as a copy that keeps its time would be
    assert index(folder).num_shards_reused == 1
    assert index_was_written(folder, before) == ["00000.idx"]
    assert ShardReader(folder).index("00000").key(1) == "x"
    (folder / "00001.idx").unlink()
    assert index(folder).num_shards_reused == 1
    assert (folder / "00001.idx").is_file()


@pytest.mark.parametrize("damage", ["inside of a member", "between two members", "no end", "header"])
def test_a_damaged_tar_is_named_with_what_to_do(folder, damage):
    tar = folder / "00001.tar"
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
    data = bytearray(tar.read_bytes())
    if damage == "header":
        data[last.offset : last.offset + 100] = bytes(range(100))
    else:
        cut = {"inside of a member": last.offset_data + 1, "between two members": last.offset, "no end": end}
        del data[cut[damage] :]
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"00001\.tar is cut off .*; fetch or write it again"):
        index(folder)
    assert not (folder / "dataset.json").exists()


def test_text_is_no_tar(folder):
    (folder / "00001.tar").write_text("text " * 1000)
    with pytest.raises(ShardError, match=r"00001\.tar is cut off or damaged"):
        index(folder)


def test_a_compressed_tar_is_refused_as_one(folder):
    with tarfile.open(folder / "00002.tar", "w:gz") as tar:
        tar.add(folder / "00001.tar", "a.mp4")
    with pytest.raises(ManifestError, match=r"00002\.tar is compressed \(gzip\)"):
        index(folder)


def test_names_that_an_index_cannot_hold_are_left_out(folder):
    write_tar(folder / "00001.tar", {**sample("my clip"), **sample("e"), **sample("über")})
    summary = index(folder)
    assert failures(folder)[1:] == [("00001.tar", 1, "my clip")]
    shards = ShardReader(folder)
    found = shards.index("00001")
    assert [found.key(slot) for slot in range(len(found))] == ["e", "über"]
    assert shards.read("00001", 0, found.members(0)[:1]) == [VIDEO + b"e"]
    assert summary.failures_by_reason["manifest: an index cannot hold the name 'my clip.mp4': it has white space, or "
                                      "is no UTF-8; rename it"] == 1  # fmt: skip


def test_videos_and_images_in_one_tar_are_refused(folder):
    write_tar(folder / "00001.tar", {**sample("e"), "f.jpg": b"picture", "f.txt": b"a cat"})
    with pytest.raises(ShardError, match=r"00001\.tar holds videos and images"):
        index(folder)


def test_nothing_that_can_be_used_is_an_error_with_the_reasons(tmp_path):
    write_tar(tmp_path / "a.tar", {"d.txt": b"no medium"})
    with pytest.raises(ShardError, match="has a sample that can be used: 1 x manifest: no video or image"):
        index(tmp_path)
    assert failures(tmp_path) == [("a.tar", 1, "d")]


def test_one_run_at_a_time(folder):
    (folder / NOTES_FOLDER).mkdir()
    with (folder / NOTES_FOLDER / "_lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardError, match=r"another `alpro shard` is indexing .*; wait for it"):
            index(folder)
    assert index(folder).num_shards == 2


def test_a_folder_that_cannot_be_written_is_an_error(folder):
    (folder / NOTES_FOLDER).write_text("a file is in the way")
    with pytest.raises(ShardError, match=r"cannot index the tars of .*: File exists \(.*index_notes\)"):
        index(folder)


def test_tars_elsewhere_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"00000\.tar is not in out="):
        index(tmp_path, manifest=str(folder))
