import json
import os
import threading
from pathlib import Path

import pytest
from shard_files import make_sample, write_dataset, write_shard

from alpro_stream.errors import ShardError
from alpro_stream.shards import (
    DatasetInfo,
    ShardIndex,
    ShardReader,
    load_dataset_info,
    load_entities,
    merge_entities,
    reader,
    save_entities,
)

SHARD = "video-000000"


def num_open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_members_and_metadata_are_read_back(tmp_path):
    write_dataset(tmp_path)
    shards = ShardReader(tmp_path)
    sample = make_sample("c", 12)
    members = shards.frame_members(SHARD, 2)
    assert shards.read(SHARD, 2, [members[7], members[0]]) == [sample.frames[7], sample.frames[0]]
    assert shards.metadata(SHARD, 2) == sample.metadata
    shards.close()
    assert shards.read(SHARD, 2, members[:1]) == [sample.frames[0]]


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    write_dataset(tmp_path, **{f"video_00000{i}": [make_sample(f"k{i}")] for i in range(5)})
    shards = ShardReader(tmp_path)
    before = num_open_files()
    for _ in range(2):
        for info in shards.info.shards:
            shards.read(info.name, 0, shards.frame_members(info.name, 0))
    assert num_open_files() - before <= 2
    shards.close()
    assert num_open_files() == before


def test_threads_read_the_same_bytes_while_files_are_closed_under_them(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    write_dataset(tmp_path, **{f"video_00000{i}": [make_sample(f"k{i}", 5 + i)] for i in range(3)})
    shards = ShardReader(tmp_path)
    wrong = []

    def read(number):
        for turn in range(200):
            which = (number + turn) % 3
            name = f"video-00000{which}"
            if tuple(shards.read(name, 0, shards.frame_members(name, 0))) != make_sample("x", 5 + which).frames:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_short_tar_names_the_sample(tmp_path):
    write_dataset(tmp_path)
    tar = tmp_path / f"{SHARD}.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    shards = ShardReader(tmp_path)
    with pytest.raises(ShardError, match=r"video-000000:2 c: cannot read .*c\.011\.jpg ends after 0 of"):
        shards.read(SHARD, 2, shards.frame_members(SHARD, 2)[-1:])
    tar.unlink()
    with pytest.raises(ShardError, match=r"video-000000:0 a: cannot read .*No such file"):
        ShardReader(tmp_path).metadata(SHARD, 0)


def test_damaged_metadata_names_the_sample(tmp_path):
    write_dataset(tmp_path)
    shards = ShardReader(tmp_path)
    member = shards.index(SHARD).members(1)[0]
    with (tmp_path / f"{SHARD}.tar").open("r+b") as file:
        file.seek(member.offset)
        file.write(b"?" * 10)
    with pytest.raises(ShardError, match="video-000000:1 b: damaged metadata"):
        shards.metadata(SHARD, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("v1.1 1\njson 0 1\n", "expected 'v1.2"),
        ("", "expected 'v1.2"),
        ("v1.2 3\njson 512 1 a.json\n", "1 samples where its first line"),
        ("v1.2 x\njson 512 1 a.json\n", "damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content, message):
    path = tmp_path / "a.idx"
    path.write_text(content)
    with pytest.raises(ShardError, match=message):
        ShardIndex.load(path)


def test_a_damaged_line_is_refused_when_it_is_used(tmp_path):
    path = tmp_path / "a.idx"
    path.write_text("v1.2 2\njson 512 1 a.json\njson 512 1\n")
    index = ShardIndex.load(path)
    assert index.key(0) == "a"
    with pytest.raises(ShardError, match="slot 1 is damaged"):
        index.members(1)
    with pytest.raises(ShardError, match="no slot 2; it has 2 samples"):
        index.members(2)


def test_index_and_description_must_agree(tmp_path):
    write_dataset(tmp_path)
    write_shard(tmp_path, samples=[make_sample("z")])
    with pytest.raises(ShardError, match=r"1 samples, but dataset.json says 3"):
        ShardReader(tmp_path).index(SHARD)
    with pytest.raises(ShardError, match="no shard 'video-000009'"):
        ShardReader(tmp_path).index("video-000009")
    (tmp_path / f"{SHARD}.idx").unlink()
    with pytest.raises(ShardError, match="cannot read the index"):
        ShardReader(tmp_path).index(SHARD)


def test_the_description_is_read_back(tmp_path):
    info = write_dataset(tmp_path / "train")
    assert load_dataset_info(tmp_path / "train") == info
    assert (info.split, info.num_samples, info.num_captions, info.num_questions) == ("train", 3, 6, 3)
    assert info.shards_of("image") == []
    assert [shard.name for shard in info.shards_of("video")] == [SHARD]


def test_the_digest_follows_the_samples(tmp_path):
    first = write_dataset(tmp_path / "1")
    again = write_dataset(tmp_path / "2")
    other = write_dataset(tmp_path / "3", video_000000=[make_sample("a", 4)])
    assert first.digest == again.digest != other.digest


def test_a_folder_without_description_says_what_to_do(tmp_path):
    with pytest.raises(ShardError, match="no such shard folder"):
        load_dataset_info(tmp_path / "none")
    with pytest.raises(ShardError, match="is empty"):
        load_dataset_info(tmp_path)
    write_shard(tmp_path / "unfinished")
    with pytest.raises(ShardError, match="did not finish; run the same"):
        load_dataset_info(tmp_path / "unfinished")
    write_dataset(tmp_path / "train")
    with pytest.raises(ShardError, match=r"name the folder of a split instead: .*/train"):
        load_dataset_info(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99, expected 1"),
        ({"shards": []}, "lists no shards"),
        ({"num_samples": "many"}, "num_samples"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    info = write_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({**info.model_dump(), **change}))
    with pytest.raises(ShardError, match=message):
        load_dataset_info(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ShardError, match="cannot be read as a data set description"):
        load_dataset_info(tmp_path)


def test_totals_are_sums(tmp_path):
    info = write_shard(tmp_path)
    total = DatasetInfo.of_shards("train", {}, [info, info])
    assert (total.num_samples, total.num_bytes) == (6, 2 * info.num_bytes)


def test_entities_are_merged_in_a_fixed_order(tmp_path):
    lists = [[("dog", 2), ("cat", 1)], [("ant", 1), ("dog", 1)], [("cat", 2)]]
    merged = merge_entities(lists)
    assert merged == merge_entities(reversed(lists)) == [("cat", 3), ("dog", 3), ("ant", 1)]
    assert merge_entities(lists, limit=1) == [("cat", 3)]
    save_entities(tmp_path / "entities.json", merged)
    assert load_entities(tmp_path / "entities.json") == merged
    assert json.loads((tmp_path / "entities.json").read_text()) == {
        "format_version": 1,
        "entities": [{"word": "cat", "count": 3}, {"word": "dog", "count": 3}, {"word": "ant", "count": 1}],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such entity list"),
        ("{", "is not an entity list"),
        ('{"entities": []}', "is not an entity list"),
        ('{"format_version": 9, "entities": []}', "format version 9, expected 1"),
    ],
)
def test_a_damaged_entity_list_is_refused(tmp_path, content, message):
    path = tmp_path / "entities.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ShardError, match=message):
        load_entities(path)
