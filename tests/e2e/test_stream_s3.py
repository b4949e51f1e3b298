"""Streams and runs over data sets behind addresses: the batches of the local ones, whatever the network does."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "resume"))

from dying_runs import config, metrics_of
from object_server import (
    CREDENTIALS,
    FaultProxy,
    FileServer,
    answer,
    cut,
    num_bytes_in,
    reset,
    running,
    s3_server,
    silence,
    stall,
)
from stream_parts import IMAGE_SIZE, NUM_FRAMES, PATCH_SIZE, assert_batches_equal, open_maker, read_all, stream_config

from alpro_stream.errors import AlproError, ShardError
from alpro_stream.media import request
from alpro_stream.run import train
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.sources import closing_storage, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.testing.shards import write_dataset, write_tokenizer

pytest.importorskip("moto.server")

PREFIX = "some folder/train"
PLACE = f"s3://corpus/{PREFIX}"
VIDEO_SHARDS, IMAGE_SHARDS = (6, 5, 6, 7, 4, 5, 6), (9,)
NUM_FILES = 2 * (len(VIDEO_SHARDS) + len(IMAGE_SHARDS))
PRELOAD = ("alpro_stream.run", "alpro_stream.testing.distributed")
FETCH = {"backoff_s": 0.001, "timeout_s": 20.0}
# Two passes: 39 videos and 9 images in batches of 8.
STEPS = range(10)
SLOW_DOWN = answer(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="0")
TOO_MANY = answer(429, Retry_After="0")
DENIED = answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
BAD_NETWORK = [
    SLOW_DOWN, TOO_MANY, reset(700), cut(4999), stall(500), answer(500), cut(0), SLOW_DOWN, reset(0), silence(0.2),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    write_dataset(root / "train", video_shards=VIDEO_SHARDS, image_shards=IMAGE_SHARDS, num_frames=6)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def expected(root):
    """The batches of the local stream."""
    return read_all(*open_maker(stream_config(root)), STEPS)


def files_of(root):
    return {path.name: path.read_bytes() for path in sorted((root / "train").iterdir())}


@pytest.fixture(scope="module")
def s3_port(root):
    with s3_server({"corpus": {f"{PREFIX}/{name}": data for name, data in files_of(root).items()}}) as port:
        yield port


def environment(address):
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_CONFIG_FILE": "/dev/null"}


@pytest.fixture
def proxy(s3_port, monkeypatch):
    with running(FaultProxy(s3_port)) as proxy:
        for name, value in environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        request._s3_client.cache_clear()
        yield proxy
        request._s3_client.cache_clear()


@contextmanager
def remote_maker(root, tmp_path, place=PLACE, max_bytes=1 << 30, **changes):
    """A maker over a data set behind an address, and its plan."""
    values = {"sources": [{"path": place}], "fetch": FETCH, **changes}
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": max_bytes, "num_fetches": 2}
    settings = stream_config(root, cache=cache, **values)
    with closing_storage(settings.sources, settings.cache, settings.fetch) as storage:
        sources = open_sources(settings.sources, settings.unit, storage)
        tokenizer = Tokenizer(settings.text.tokenizer, settings.text.num_tokens)
        decoder = build_clip_decoder(settings.decode, IMAGE_SIZE, settings.global_batch * NUM_FRAMES, None)
        yield (
            BatchMaker(settings, sources, tokenizer, decoder, NUM_FRAMES, IMAGE_SIZE, PATCH_SIZE),
            make_plan(settings, sources),
        )


def assert_same_stream(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_batches_equal(one, other)


def wanted(proxy):
    """The names of the files that were asked for, in order."""
    return [path.partition("?")[0].rpartition("/")[2] for path, _ in proxy.requests]


def test_two_passes_ask_once_for_every_file(root, expected, proxy, tmp_path):
    with remote_maker(root, tmp_path) as (maker, plan):
        assert_same_stream(read_all(maker, plan, STEPS), expected)
    names = wanted(proxy)
    assert sorted(names) == sorted({"dataset.json"} | {name for name in files_of(root) if "-" in name})
    assert len(names) == NUM_FILES + 1
    # What is in the cache is not asked for again.
    with remote_maker(root, tmp_path) as (maker, plan):
        assert_same_stream(read_all(maker, plan, STEPS), expected)
    assert wanted(proxy)[len(names) :] == ["dataset.json"]


def test_a_bad_network_changes_nothing_and_costs_one_request_a_fault(root, expected, proxy, tmp_path):
    proxy.faults = list(BAD_NETWORK)
    # Which of two fetches meets which fault is chance: one file may meet them all.
    fetch = {**FETCH, "timeout_s": 3.0, "attempts": len(BAD_NETWORK) + 1}
    with remote_maker(root, tmp_path, fetch=fetch) as (maker, plan):
        assert_same_stream(read_all(maker, plan, STEPS), expected)
    assert not proxy.faults
    assert len(proxy.requests) <= NUM_FILES + 1 + len(BAD_NETWORK)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_cache_that_holds_little_gives_the_same_stream(root, expected, proxy, tmp_path, num_workers):
    """Four lanes in windows of two shards read up to eight tars at once; here is room for about three."""
    max_bytes = 3 * max(len(data) for data in files_of(root).values())
    proxy.faults = [SLOW_DOWN, reset(300), cut(100)]
    with remote_maker(root, tmp_path, max_bytes=max_bytes, decode={"num_workers": num_workers}) as (maker, plan):
        found = []
        for batch in read_all(maker, plan, STEPS):
            found.append(batch)
            assert num_bytes_in(tmp_path / "cache", "files") <= max_bytes
    assert_same_stream(found, expected)
    # A tar that is open is read though it was removed: what is fetched again was closed in between.
    assert len(proxy.requests) <= 3 * NUM_FILES


def test_files_over_http_are_the_same_stream(root, expected, tmp_path):
    with running(FileServer({f"/some/{name}": data for name, data in files_of(root).items()})) as server:
        place = f"{server.address}/some"
        for number, length in enumerate(("stated", "chunked")):
            server.length = length
            with remote_maker(root, tmp_path / str(number), place) as (maker, plan):
                assert_same_stream(read_all(maker, plan, STEPS[:4]), expected[:4])


def test_resumed_in_the_middle_only_what_is_left_is_fetched(root, expected, proxy, tmp_path):
    with remote_maker(root, tmp_path) as (maker, plan):
        assert_same_stream(read_all(maker, plan, range(8, 9)), expected[8:9])
        planned = plan[8]
        names = {maker.sources[planned.source].shards[number].name for number in planned.refs[..., 0].flat}
    assert sorted(wanted(proxy)) == sorted(["dataset.json", *(f"{n}.{kind}" for n in names for kind in ("tar", "idx"))])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_tar_that_is_missing_ends_the_stream_with_its_address(root, tmp_path, num_workers):
    files = files_of(root)
    del files["video-000003.tar"]
    with running(FileServer({f"/{name}": data for name, data in files.items()})) as server:
        decode = {"num_workers": num_workers}
        with (
            remote_maker(root, tmp_path, server.address, decode=decode) as (maker, plan),
            pytest.raises(ShardError, match=rf"^{server.address}/video-000003\.tar: missing: .*404"),
        ):
            read_all(maker, plan, STEPS)


def test_credentials_that_are_refused_are_named_before_anything_begins(root, proxy, tmp_path):
    proxy.faults = [DENIED] * 10
    with (
        pytest.raises(ShardError, match=r"^s3://corpus/.*dataset\.json: forbidden: .*AWS_ACCESS_KEY_ID"),
        remote_maker(root, tmp_path),
    ):
        pass
    assert len(proxy.requests) == 1


def test_credentials_that_are_refused_in_the_middle(root, proxy, tmp_path):
    with remote_maker(root, tmp_path, decode={"num_workers": 0}) as (maker, plan):
        proxy.faults = [DENIED] * 40
        with pytest.raises(ShardError, match=r"^s3://corpus/.*video-00000\d\.\w+: forbidden"):
            read_all(maker, plan, STEPS)


@pytest.mark.parametrize("kind", ["tar", "idx"])
def test_a_data_set_that_is_changed_behind_our_back_ends_the_stream(root, expected, tmp_path, kind):
    files = {f"/{name}": data for name, data in files_of(root).items()}
    with running(FileServer(files)) as server, remote_maker(root, tmp_path, server.address) as (maker, plan):
        name = f"/video-000002.{kind}"
        server.files[name] = bytes(reversed(server.files[name]))
        message = rf"^{server.address}{name}: found sha256 .*, expected sha256 .*the data set was changed"
        with pytest.raises(ShardError, match=message):
            read_all(maker, plan, STEPS)


def test_secrets_in_an_address_are_not_shown(root, tmp_path):
    files = {f"/{name}": data for name, data in files_of(root).items() if name != "video-000001.idx"}
    with running(FileServer(files)) as server:
        place = f"{server.address}?token=secret"
        server.files |= {f"{path}?token=secret": data for path, data in server.files.items()}
        with remote_maker(root, tmp_path, place) as (maker, plan), pytest.raises(ShardError) as caught:
            read_all(maker, plan, STEPS)
    assert "video-000001.idx" in str(caught.value)
    assert "secret" not in str(caught.value)


def remote_run(root, folder, place, **changes):
    values = {"stream.sources": [{"path": place, "kind": "video"}], "stream.cache.folder": str(folder / "cache")}
    fetch = {f"stream.fetch.{name}": value for name, value in FETCH.items()}
    return config(root, folder / "run", **values, **fetch, **{"train.max_steps": 4, "train.timeout_s": 40, **changes})


def train_each(root, folder, runs, variables):
    """Of every run its metrics (of rank 0), or what ended it; on each rank."""
    os.environ.update(variables)
    found = []
    for name, place in runs:
        try:
            train(remote_run(root, folder / name, place))
            found.append(metrics_of(folder / name / "run"))
        except AlproError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_two_ranks_share_what_was_fetched_and_both_end_at_what_is_missing(root, s3_port, tmp_path):
    """The missing tar is on the server of a copy, so that one rank may meet it long before the other."""
    files = {f"/{name}": data for name, data in files_of(root).items() if name != "video-000004.tar"}
    with running(FaultProxy(s3_port)) as proxy, running(FileServer(files)) as server:
        runs = [("local", str(root / "train")), ("s3", PLACE), ("missing", server.address)]
        first, second = run_ranks(
            train_each, 2, root, tmp_path, runs, environment(proxy.address), preload=PRELOAD, timeout_s=200
        )
    assert first[1] == first[0]
    assert len(first[0]) == 4
    names = wanted(proxy)
    assert names.count("dataset.json") == 1
    assert len(names) == len(set(names))
    # Whoever needed it names it, and the other hands that on.
    for found in (first, second):
        assert f"{server.address}/video-000004.tar: missing: " in found[2]
    asked = [path for path, _ in server.requests]
    assert asked.count("/dataset.json") == 1
