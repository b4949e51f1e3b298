import logging
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
from object_server import FileServer, running
from pydantic import ValidationError

from alpro_stream.errors import PlanError, ShardError
from alpro_stream.media import FetchConfig
from alpro_stream.shards.cache import CacheConfig
from alpro_stream.shards.files import open_files_problem
from alpro_stream.shards.layout import load_dataset_info, save_dataset_info, tar_path
from alpro_stream.shards.reader import ShardReader
from alpro_stream.stream.plan import SourceShape
from alpro_stream.stream.sources import (
    MOST_OPEN_SHARDS,
    SourceConfig,
    closing_storage,
    open_sources,
    read_listings,
    shards_kept_open,
)
from alpro_stream.testing.shards import write_dataset


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = tmp_path_factory.mktemp("both")
    write_dataset(directory, video_shards=[3, 2], image_shards=[4], size=16)
    return directory


def opened(*configs):
    return [(source.name, source.kind, source.shape) for source in open_sources([SourceConfig(**c) for c in configs])]


def test_a_data_set_gives_a_source_of_each_kind(both):
    assert opened({"path": both, "weight": 2}) == [
        ("video", "video", SourceShape("video", (3, 2), 2)),
        ("image", "image", SourceShape("image", (4,), 2)),
    ]


def test_names(both):
    named = [name for name, *_ in opened({"path": both, "name": "web"}, {"path": both, "name": "x", "kind": "image"})]
    assert named == ["web-video", "web-image", "x"]


def test_sources_of_one_name_are_refused(both):
    with pytest.raises(PlanError, match="two sources are named 'video'; give each its own"):
        opened({"path": both}, {"path": both, "kind": "video"})


def test_a_kind_that_is_not_there(tmp_path):
    write_dataset(tmp_path, video_shards=[2], size=16)
    with pytest.raises(PlanError, match="has no image shards, only video"):
        opened({"path": tmp_path, "kind": "image"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": {"size": 16}}, 16),
        ({"frames": {"size": 24, "resize": "square"}}, 24),
        ({"frames": {"size": 24, "resize": "short_side"}}, None),
        ({"frames": {"size": None}}, None),
        ({}, None),
    ],
)
def test_the_size_of_stored_frames(tmp_path, options, expected):
    write_dataset(tmp_path, video_shards=[2], size=16)
    save_dataset_info(tmp_path, load_dataset_info(tmp_path).model_copy(update={"options": options}))
    (source,) = open_sources([SourceConfig(path=tmp_path)])
    assert source.stored_size == expected


@pytest.mark.parametrize(
    ("options", "payload", "videos"),
    [({}, "frames", [False, False]), ({"payload": "video"}, "video", [True, False])],
)
def test_what_is_stored(both, tmp_path, options, payload, videos):
    shutil.copytree(both, tmp_path / "x")
    save_dataset_info(tmp_path / "x", load_dataset_info(both).model_copy(update={"options": options}))
    sources = open_sources([SourceConfig(path=tmp_path / "x")])
    assert [source.payload for source in sources] == [payload] * 2
    assert [source.stores_videos for source in sources] == videos


def test_the_description_is_read_by_one_rank_for_all(both, tmp_path):
    """With the listings of the first rank, another one looks at no description and no exclude list."""
    shutil.copytree(both, tmp_path / "x")
    (tmp_path / "exclude.txt").write_text("video-00004\n")
    configs = [SourceConfig(path=tmp_path / "x", exclude=tmp_path / "exclude.txt")]
    expected = [source.shape for source in open_sources(configs)]
    assert [shape.shard_sizes for shape in expected] == [(3, 1), (4,)]
    listings = pickle.loads(pickle.dumps(read_listings(configs)))
    for path in (tmp_path / "x" / "dataset.json", tmp_path / "exclude.txt", *(tmp_path / "x").glob("*.idx")):
        path.unlink()
    assert [source.shape for source in open_sources(configs, listings=listings)] == expected
    with pytest.raises(ShardError):
        open_sources(configs)


def test_an_address_needs_a_cache(both):
    listings = read_listings([SourceConfig(path=both)])
    with pytest.raises(ShardError, match="shards are fetched into a local cache: none was given"):
        open_sources([SourceConfig(path="s3://bucket/train")], listings=listings)


def test_only_addresses_get_a_cache(both, tmp_path):
    cache = CacheConfig(folder=tmp_path)
    with closing_storage([SourceConfig(path=both)], cache, FetchConfig(), max_open=7) as storage:
        assert (storage.cache, storage.max_open) == (None, 7)
    assert list(tmp_path.iterdir()) == []
    configs = [SourceConfig(path=both), SourceConfig(path="s3://bucket/train")]
    with closing_storage(configs, cache, FetchConfig()) as storage:
        assert storage.cache is not None
        assert len(list((tmp_path / "users").iterdir())) == 1
    assert list((tmp_path / "users").iterdir()) == []


def test_units_are_slots_unless_something_is_excluded(both, tmp_path):
    (tmp_path / "exclude.txt").write_text("video-00000\n")
    (plain, _) = open_sources([SourceConfig(path=both)])
    (short, _) = open_sources([SourceConfig(path=both, exclude=tmp_path / "exclude.txt")])
    assert [plain.locate(0, unit) for unit in range(3)] == [(0, None), (1, None), (2, None)]
    assert [short.locate(0, unit) for unit in range(2)] == [(1, None), (2, None)]
    assert short.locate(1, 0) == (0, None)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_weights_are_positive_numbers(both, weight):
    with pytest.raises(ValidationError):
        SourceConfig(path=both, weight=weight)


def listing_of(directory, folder, keys, unit="clip", **changes):
    path = folder / "exclude.txt"
    path.write_bytes(keys if isinstance(keys, bytes) else "".join(f"{key}\n" for key in keys).encode())
    return read_listings([SourceConfig(path=directory, exclude=path, **changes)], unit)[0]


def test_keys_of_a_list_that_are_nowhere_are_told(both, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    listing_of(both, tmp_path, ["video-00003", "image-00001"])
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2 samples excluded by the 2 keys of" in caplog.text
    caplog.clear()
    # One list for both kinds raises no alarm, either.
    listing = listing_of(both, tmp_path, ["video-00003", "image-00001"], kind="image")
    assert listing.excluded == {"image-000000": (1,)}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    caplog.clear()
    assert not listing_of(both, tmp_path, ["clips/b", "clips/a"]).excluded
    assert caplog.records[0].levelname == "WARNING"
    assert "2 of the 2 keys of the exclude list" in caplog.text
    assert "such as 'clips/a'; the keys of its samples are such as 'video-00000'" in caplog.text
    caplog.clear()
    listing_of(both, tmp_path, ["video-00003", "nobody", "video-00001"])
    assert "1 of the 3 keys of the exclude list" in caplog.text
    assert "such as 'nobody'" in caplog.text
    caplog.clear()
    assert listing_of(both, tmp_path, []).exclude_digest is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_list_may_begin_with_a_mark_of_its_encoding(both, tmp_path):
    listing = listing_of(both, tmp_path, b"\xef\xbb\xbfvideo-00001\r\nvideo-00004\r\n")
    assert listing.excluded == {"video-000000": (1,), "video-000001": (1,)}


def test_of_an_excluded_sample_only_its_own_texts_are_read(both, tmp_path):
    directory = shutil.copytree(both, tmp_path / "x")
    info = load_dataset_info(directory)
    # So that whoever counts all samples of the first shard finds another number.
    wrong = info.shards[0].model_copy(update={"num_captions": 100})
    save_dataset_info(directory, info.model_copy(update={"shards": [wrong, *info.shards[1:]]}))
    with pytest.raises(ShardError, match=r"holds \d captions"):
        ShardReader(directory).counts(wrong.name)
    num_captions = len(ShardReader(directory).metadata(wrong.name, 1).captions)
    assert num_captions
    listing = listing_of(directory, tmp_path, ["video-00001"], "caption")
    assert listing.num_removed == {wrong.name: num_captions}


def test_an_excluded_sample_that_is_damaged_takes_what_it_counts_for(both, tmp_path):
    directory = shutil.copytree(both, tmp_path / "x")
    tar = tar_path(directory, "video-000000")
    tar.write_bytes(tar.read_bytes().replace(b'{"id": "video-00001"', b'{"id"; "video-00001"'))
    total = load_dataset_info(directory).shards[0].num_captions
    listing = listing_of(directory, tmp_path, ["video-00001"], "caption")
    assert listing.num_removed["video-000000"] == ShardReader(directory).counts("video-000000")[1, 0] > 0
    (source, _) = open_sources([SourceConfig(path=directory)], "caption", listings=[listing])
    (num_left, _) = source.shape.shard_sizes
    assert num_left == total - listing.num_removed["video-000000"]
    assert all(source.locate(0, unit)[0] != 1 for unit in range(num_left))


@pytest.mark.parametrize("unit", ["clip", "caption"])
def test_indexes_behind_an_address_are_fetched_several_at_a_time(tmp_path, unit):
    folder = tmp_path / "train"
    write_dataset(folder, video_shards=[2] * 6, size=16)
    (tmp_path / "exclude.txt").write_text("video-00003\n")
    with running(FileServer({f"/{path.name}": path.read_bytes() for path in folder.iterdir()})) as server:
        plain, lock, at_once = server.RequestHandlerClass, threading.Lock(), threading.Event()
        in_flight = []

        class Waiting(plain):
            """Gives no index until three of them are asked for."""

            def do_GET(self):
                if self.path.endswith(".idx"):
                    with lock:
                        in_flight.append(self.path)
                        if len(in_flight) >= 3:
                            at_once.set()
                    at_once.wait(10)
                super().do_GET()
                with lock:
                    if self.path in in_flight:
                        in_flight.remove(self.path)

        server.RequestHandlerClass = Waiting
        configs = [SourceConfig(path=server.address, exclude=tmp_path / "exclude.txt")]
        cache = CacheConfig(folder=tmp_path / "cache", num_fetches=3)
        with closing_storage(configs, cache, FetchConfig(backoff_s=0.01)) as storage:
            (listing,) = read_listings(configs, unit, storage)
            # Nobody is to think that these files are still needed.
            (user,) = (tmp_path / "cache" / "users").glob("*.json")
            assert "sha256" not in user.read_text()
            assert not any(shard.index_sha256 in user.read_text() for shard in listing.info.shards)
    assert at_once.is_set()
    assert listing.excluded == {"video-000001": (1,)}
    tars = [path for path, _ in server.requests if path.endswith(".tar")]
    assert tars == ([] if unit == "clip" else ["/video-000001.tar"])


@pytest.mark.parametrize(
    ("unit", "keys", "message"),
    [
        ("question", [], r"source 'image' has 0 questions in its 1 samples; set another stream.unit, or leave the"),
        (
            "clip",
            ["image-00000"],
            r"'image' has 0 clips in its 1 samples, 1 of them excluded by .*exclude.txt; cor",
        ),
    ],
)
def test_a_source_without_a_unit(tmp_path, unit, keys, message):
    write_dataset(tmp_path / "x", video_shards=[], image_shards=[1], size=16)
    info = load_dataset_info(tmp_path / "x")
    shards = [shard.model_copy(update={"num_questions": 0}) for shard in info.shards]
    save_dataset_info(tmp_path / "x", info.model_copy(update={"shards": shards}))
    listing = listing_of(tmp_path / "x", tmp_path, keys, unit)
    with pytest.raises(PlanError, match=message):
        open_sources([SourceConfig(path=tmp_path / "x", exclude=tmp_path / "exclude.txt")], unit, listings=[listing])


@pytest.mark.parametrize(
    ("read_at_once", "num_datasets", "expected"),
    [(16, 1, 64), (128, 1, 128), (10_000, 1, MOST_OPEN_SHARDS), (128, 5, 102), (16, 1000, 1), (16, 5, 64)],
)
def test_data_sets_share_the_files_that_may_be_open(read_at_once, num_datasets, expected):
    assert shards_kept_open(read_at_once, num_datasets) == expected
    assert num_datasets * expected <= max(MOST_OPEN_SHARDS, num_datasets)


# In a process of its own, where nothing else opens and closes files.
TOO_MANY = """
import os, resource, sys
from contextlib import suppress
from alpro_stream.errors import ShardError
from alpro_stream.shards.reader import ShardReader
fresh, indexed = ShardReader(sys.argv[1]), ShardReader(sys.argv[1])
indexed.index("video-000000")
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
taken = []
with suppress(OSError):
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
for reader in (fresh, indexed):
    try:
        reader.metadata("video-000000", 0)
    except ShardError as error:
        print(error)
for descriptor in taken:
    os.close(descriptor)
assert fresh.metadata("video-000000", 0).captions
"""


def test_too_many_open_files_are_called_that(both):
    run = [sys.executable, "-c", TOO_MANY, str(both)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    told = "this process has 40 files open, and may have no more: raise its limit (`ulimit -n`, here up to 40)"
    of_index, of_tar = done.stdout.splitlines()
    assert told in of_index
    assert "video-000000.idx cannot be opened" in of_index
    assert told in of_tar
    # No word of an index that is damaged.
    assert done.stderr == ""


def test_other_errors_are_not_of_open_files():
    assert open_files_problem(FileNotFoundError(2, "no")) is None
    assert open_files_problem(None) is None


def test_a_path_that_is_a_file_names_its_folder(both):
    tar = tar_path(both, "video-000000")
    with pytest.raises(
        ShardError, match=f"{tar} is a file, and a data set is a folder of shards: name its folder, {both}$"
    ):
        open_sources([SourceConfig(path=tar)])


@pytest.mark.parametrize("place", ["htp://host/train", "gs://bucket/train"])
def test_an_address_that_nobody_can_fetch(both, place):
    for config in (SourceConfig(path=place), SourceConfig(path=both, exclude=f"{place}/exclude.txt")):
        with pytest.raises(ShardError, match=r"cannot fetch (htp|gs)://; give .*http://, https://, s3://") as caught:
            read_listings([config])
        assert "\n" not in str(caught.value)
