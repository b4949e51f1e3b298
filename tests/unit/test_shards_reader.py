import json
import threading
import time
import tracemalloc

import numpy as np
import pytest
from open_files import open_files
from shard_files import make_sample, write_dataset, write_shard

from alpro_stream.errors import SampleError, ShardError
from alpro_stream.shards import (
    DatasetInfo,
    SampleMetadata,
    ShardIndex,
    ShardReader,
    load_dataset_info,
    load_entities,
    merge_entities,
    save_dataset_info,
    save_entities,
)
from alpro_stream.shards.header import header_problem, own_header

SHARD = "video-000000"


def num_open_files(folder):
    return sum(target.startswith(f"{folder}/") for _, target in open_files())


def test_members_and_metadata_are_read_back(tmp_path):
    write_dataset(tmp_path)
    shards = ShardReader(tmp_path)
    sample = make_sample("c", 12)
    members = shards.frame_members(SHARD, 2)
    assert shards.read(SHARD, 2, [members[7], members[0]]) == [sample.frames[7], sample.frames[0]]
    assert shards.metadata(SHARD, 2) == sample.metadata
    shards.close()
    assert shards.read(SHARD, 2, members[:1]) == [sample.frames[0]]


def test_few_shards_stay_open(tmp_path):
    write_dataset(tmp_path, **{f"video_00000{i}": [make_sample(f"k{i}")] for i in range(5)})
    shards = ShardReader(tmp_path, max_open=2)
    for _ in range(2):
        for info in shards.info.shards:
            shards.read(info.name, 0, shards.frame_members(info.name, 0))
    assert 0 < num_open_files(tmp_path) <= 2
    shards.close()
    assert num_open_files(tmp_path) == 0


def test_threads_read_the_same_bytes_while_files_are_closed_under_them(tmp_path):
    write_dataset(tmp_path, **{f"video_00000{i}": [make_sample(f"k{i}", 5 + i)] for i in range(3)})
    shards = ShardReader(tmp_path, max_open=1)
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


def outcome(shards, slot):
    """What reading all of a sample comes to: what it holds, or why not; nothing else may be raised."""
    try:
        metadata = shards.metadata(SHARD, slot)
        return metadata, tuple(shards.read(SHARD, slot, shards.media_members(SHARD, slot)))
    except SampleError as error:
        return error.cause if error.place.startswith(f"{SHARD}:{slot} ") else str(error)


def wholes(samples):
    return [(sample.metadata, sample.frames) for sample in samples]


SAMPLES = [make_sample("a", 3), make_sample("b", 1), make_sample("c", 12)]


def test_a_tar_that_was_cut_off_gives_what_it_still_has(tmp_path):
    write_dataset(tmp_path)
    tar = tmp_path / f"{SHARD}.tar"
    data, good = tar.read_bytes(), wholes(SAMPLES)
    ends = [ShardReader(tmp_path).index(SHARD).members(slot)[-1] for slot in range(3)]
    sizes = {0, 1, 511, 512, len(data) - 1, len(data) - 1024}
    for member in ShardReader(tmp_path).index(SHARD).members(1):
        sizes |= {member.offset - 512, member.offset - 1, member.offset, member.offset + 1, member.offset + member.size}
    for size in sorted(sizes):
        tar.write_bytes(data[:size])
        shards = ShardReader(tmp_path)
        whole = [size >= end.offset + end.size for end in ends]
        assert [outcome(shards, slot) for slot in range(3)] == [
            good[slot] if whole[slot] else "truncated" for slot in range(3)
        ], size
    tar.write_bytes(data[: ends[2].offset + 10])
    shards = ShardReader(tmp_path)
    with pytest.raises(SampleError, match=r"^video-000000:2 c: the tar ends after 10 of \d+ bytes of c\.011\.jpg"):
        shards.read(SHARD, 2, shards.frame_members(SHARD, 2)[-1:])


def test_a_tar_that_cannot_be_read_is_no_bad_sample(tmp_path):
    write_dataset(tmp_path)
    tar = tmp_path / f"{SHARD}.tar"
    tar.unlink()
    with pytest.raises(ShardError, match=r"video-000000:0 a: cannot read .*No such file"):
        ShardReader(tmp_path).metadata(SHARD, 0)
    tar.mkdir()
    with pytest.raises(ShardError, match=r"video-000000:0 a: cannot read .*Is a directory"):
        ShardReader(tmp_path).metadata(SHARD, 0)


def test_damaged_metadata_names_the_sample(tmp_path):
    write_dataset(tmp_path)
    shards = ShardReader(tmp_path)
    member = shards.index(SHARD).members(1)[0]
    tar = tmp_path / f"{SHARD}.tar"
    data = tar.read_bytes()
    for fields in (b"?" * 10, b"[" * member.size, b'{"id": 7 ', b"\xff", bytes(member.size)):
        tar.write_bytes(data[: member.offset] + fields + data[member.offset + len(fields) :])
        with pytest.raises(SampleError, match="video-000000:1 b: damaged metadata") as caught:
            shards.metadata(SHARD, 1)
        assert caught.value.cause == "metadata"
        assert shards.metadata(SHARD, 2) == SAMPLES[2].metadata


@pytest.mark.parametrize(
    "change",
    [
        {"captions": [1]},
        {"captions": None},
        {"qa": [{"question": 1, "answer": "x"}]},
        {"qa": ["x"]},
        {"kind": "sound"},
        {"id": 3},
        {"frame_timestamps_s": ["0"]},
        {"source": []},
    ],
)
def test_metadata_of_other_types_is_damaged(change):
    fields = json.loads(SAMPLES[0].metadata.to_json())
    with pytest.raises((TypeError, ValueError, KeyError)):
        SampleMetadata.from_json("a", json.dumps({**fields, **change}).encode())


def test_the_header_that_is_compared_as_a_whole_is_the_one_that_is_written(tmp_path):
    """Else all headers would be parsed, which is right too and several times as slow."""
    write_dataset(tmp_path)
    data = (tmp_path / f"{SHARD}.tar").read_bytes()
    index = ShardReader(tmp_path).index(SHARD)
    for member in [member for slot in range(3) for member in index.members(slot)]:
        header = data[member.offset - 512 : member.offset]
        assert own_header(member) == header
        assert header_problem(header, member) is None
        assert header_problem(header, member._replace(size=member.size + 1)) is not None
        assert header_problem(header, member._replace(name=f"x{member.name}")) is not None


def test_no_flipped_bit_of_a_header_gives_the_contents_of_another_member(tmp_path):
    write_dataset(tmp_path)
    tar = tmp_path / f"{SHARD}.tar"
    data, good = bytearray(tar.read_bytes()), wholes(SAMPLES)
    header = ShardReader(tmp_path).index(SHARD).members(1)[2].offset - 512
    with tar.open("r+b") as file:
        for position in range(0, 512, 3):
            for bit in (0, 7):
                file.seek(header + position)
                file.write(bytes([data[header + position] ^ 1 << bit]))
                file.flush()
                shards = ShardReader(tmp_path)
                assert [outcome(shards, slot) for slot in range(3)] == [good[0], "index", good[2]], (position, bit)
            file.seek(header + position)
            file.write(data[header + position : header + position + 1])


def test_no_flipped_bit_of_the_index_gives_the_contents_of_another_member(tmp_path):
    write_dataset(tmp_path)
    path = tmp_path / f"{SHARD}.idx"
    data, good = path.read_bytes(), wholes(SAMPLES)
    start, end = [position for position, byte in enumerate(data) if byte == ord("\n")][1:3]  # of the second sample
    for position in range(start + 1, end):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            if b"\n" in damaged[start + 1 : end]:
                with pytest.raises(ShardError, match="4 samples where its first line is"):
                    outcome(ShardReader(tmp_path), 0)
                continue
            shards = ShardReader(tmp_path)
            found = [outcome(shards, slot) for slot in range(3)]
            assert found[::2] == good[::2], (position, bit)
            # Nothing reads the caption in its own file.
            assert found[1] in ("index", "truncated", good[1]), (position, bit, found[1])


@pytest.mark.parametrize("place", [f"512 {10**15}", f"512 {10**30}", f"{10**30} 5", "0 5", "-512 5", "512 -5"])
def test_an_index_with_absurd_numbers_asks_for_no_memory(tmp_path, place):
    write_dataset(tmp_path)
    path = tmp_path / f"{SHARD}.idx"
    header, line, *others = path.read_text().splitlines()
    path.write_text("\n".join([header, f"json {place} a.json {line.partition('a.json ')[2]}", *others, ""]))
    shards = ShardReader(tmp_path)
    assert [outcome(shards, slot) for slot in range(3)] == [
        "truncated" if place.startswith("1000") else "index",
        *wholes(SAMPLES)[1:],
    ]


def test_an_index_of_another_tar_gives_nothing(tmp_path):
    write_dataset(tmp_path / "ours")
    others = [make_sample("d", 4), make_sample("e", 2), make_sample("f", 9)]
    write_dataset(tmp_path / "theirs", video_000000=others)
    (tmp_path / "theirs" / f"{SHARD}.idx").rename(tmp_path / "ours" / f"{SHARD}.idx")
    shards = ShardReader(tmp_path / "ours")
    assert [outcome(shards, slot) for slot in range(3)] == ["index"] * 3
    with pytest.raises(
        SampleError, match=r"video-000000:0 d: at byte 0 the index has 'd.json' with \d+ bytes?|tar has"
    ):
        shards.metadata(SHARD, 0)


def test_members_that_changed_places_are_not_taken_for_each_other(tmp_path):
    write_dataset(tmp_path, video_000000=[make_sample("a", 3), make_sample("b", 3)])
    path = tmp_path / f"{SHARD}.idx"
    text = path.read_text()
    swapped = text.replace(".000.jpg", "?").replace("000.jpg", "!").replace("001.jpg", "000.jpg")
    swapped = swapped.replace("?", ".001.jpg").replace("!", "001.jpg")
    assert swapped != text
    path.write_text(swapped)
    shards = ShardReader(tmp_path)
    with pytest.raises(SampleError, match=r"the index has 'a.001.jpg', and the tar has 'a.000.jpg'"):
        shards.read(SHARD, 0, shards.frame_members(SHARD, 0))


@pytest.mark.parametrize("contents", [None, b"", b"v1.2 3\njson 512", b"v1.1 0\n"])
def test_an_index_that_cannot_be_read_is_made_from_the_tar(tmp_path, caplog, contents):
    write_dataset(tmp_path, video_000000=SAMPLES, video_000001=[make_sample("d")])
    for name in (SHARD, "video-000001"):
        (tmp_path / f"{name}.idx").unlink()
        if contents is not None:
            (tmp_path / f"{name}.idx").write_bytes(contents)
    before = sorted(tmp_path.iterdir())
    shards = ShardReader(tmp_path)
    assert [outcome(shards, slot) for slot in range(3)] == wholes(SAMPLES)
    assert shards.metadata("video-000001", 0).key == "d"
    assert sorted(tmp_path.iterdir()) == before
    assert [record.message.count(f"{SHARD}.idx") for record in caplog.records] == [1]
    assert "made from the tar" in caplog.text


def test_a_tar_that_was_cut_off_and_has_no_index_gives_what_it_still_has(tmp_path):
    write_dataset(tmp_path)
    tar, index = (tmp_path / f"{SHARD}.{suffix}" for suffix in ("tar", "idx"))
    data, last = tar.read_bytes(), ShardReader(tmp_path).index(SHARD).members(2)[5]
    index.unlink()
    for size in (last.offset - 512, last.offset - 100, last.offset, last.offset + 10):
        tar.write_bytes(data[:size])
        shards = ShardReader(tmp_path)
        assert [outcome(shards, slot) for slot in range(3)] == [*wholes(SAMPLES)[:2], "truncated"]
        assert shards.index(SHARD).keys() == ["a", "b", ""]
        assert shards.counts(SHARD).tolist() == [[2, 1]] * 3
    tar.write_bytes(data[: last.offset - 512] + b"?" * 100 + data[last.offset - 412 :])
    with pytest.raises(ShardError, match=r"video-000000\.tar is cut off or damaged at byte"):
        ShardReader(tmp_path).index(SHARD)


def test_counts_add_up_to_the_description_whatever_is_damaged(tmp_path):
    captions = [("a",), ("b", "c", "d"), ("e", "f"), ("g",), ("h", "i")]
    samples = [make_sample(f"k{i}", captions=texts) for i, texts in enumerate(captions)]
    write_dataset(tmp_path, video_000000=samples)
    shards = ShardReader(tmp_path)
    counts = shards.counts(SHARD)
    assert counts.tolist() == [[len(texts), 1] for texts in captions]
    assert counts.dtype == np.int64
    assert shards.counts(SHARD) is counts
    with (tmp_path / f"{SHARD}.tar").open("r+b") as file:
        for slot in (1, 3):
            file.seek(shards.index(SHARD).members(slot)[0].offset)
            file.write(b"?")
    assert ShardReader(tmp_path).counts(SHARD).tolist() == [[1, 1], [4, 2], [2, 1], [0, 0], [2, 1]]


def test_counts_that_the_description_does_not_have_are_refused(tmp_path):
    info = write_dataset(tmp_path)
    for change in ({"num_captions": 7}, {"num_captions": 5}, {"num_questions": 0}):
        other = DatasetInfo.of_shards("x", {}, [info.shards[0].model_copy(update=change)])
        with pytest.raises(ShardError, match=r"holds 6 captions and 3 questions, but its dataset.json says"):
            ShardReader(tmp_path, other).counts(SHARD)


def test_an_address_needs_a_cache():
    with pytest.raises(ShardError, match=r"^s3://bucket/train is an address, .*files=CachedFiles"):
        ShardReader("s3://bucket/train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("v1.1 1\njson 0 1\n", "expected 'v1.2"),
        ("", "expected 'v1.2"),
        ("v1.2 3\njson 512 1 a.json\n", "1 samples where its first line"),
        ("v1.2 x\njson 512 1 a.json\n", "damaged"),
        ("v1.2 2\njson 512 1 a.json\njson 1536 1 b.js", "1 samples where its first line"),
        ("v1.2 1\njson 512 1 a.json\njson 1536 1 b.js", "cut off or damaged"),
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
    assert index.keys() == ["a", ""]
    with pytest.raises(ShardError, match="slot 1 is damaged"):
        index.members(1)
    with pytest.raises(ShardError, match="no slot 2; it has 2 samples"):
        index.members(2)


def test_index_and_description_must_agree(tmp_path):
    write_dataset(tmp_path)
    write_shard(tmp_path, samples=[make_sample("z")])
    with pytest.raises(ShardError, match=r"has 1 samples, but dataset.json says 3"):
        ShardReader(tmp_path).index(SHARD)
    with pytest.raises(ShardError, match="no shard 'video-000009'"):
        ShardReader(tmp_path).index("video-000009")
    (tmp_path / f"{SHARD}.idx").unlink()
    with pytest.raises(ShardError, match=r"has 1 samples, but dataset.json says 3"):
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


def test_ten_thousand_shards_are_opened_at_once(tmp_path):
    shard = write_shard(tmp_path)
    shards = [shard.model_copy(update={"name": f"video-{number:06d}"}) for number in range(10_000)]
    save_dataset_info(tmp_path, DatasetInfo.of_shards("x", {}, shards))
    began = time.process_time()
    load_dataset_info(tmp_path)
    assert time.process_time() - began < 3  # a quarter of a second
    tracemalloc.start()
    try:
        info = load_dataset_info(tmp_path)
        assert len(ShardReader(tmp_path, info).info.shards) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


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
