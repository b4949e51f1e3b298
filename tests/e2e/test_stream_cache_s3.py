"""The shard cache in front of a real S3 server, behind a network that throttles, cuts and stalls."""

import hashlib
import os
import random
import threading
import time
from contextlib import closing

import pytest
from object_server import CREDENTIALS, FaultProxy, answer, cut, reset, running, s3_server, stall

from alpro_stream.errors import ShardError
from alpro_stream.media import request
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache
from alpro_stream.shards.remote_files import join, read_file

pytest.importorskip("moto.server")

DATA = [random.Random(number).randbytes(200_000) for number in range(8)]
PLACE = "s3://corpus/some folder/train"
FETCH = FetchConfig(backoff_s=0.001, timeout_s=3.0)
SLOW_DOWN = answer(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="0")
DENIED = answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")


@pytest.fixture(scope="module")
def s3_port():
    objects = {f"some folder/train/video-{number:06d}.tar": data for number, data in enumerate(DATA)}
    with s3_server({"corpus": {**objects, "some folder/train/dataset.json": b"{}"}}) as port:
        yield port


@pytest.fixture
def proxy(s3_port, monkeypatch):
    with running(FaultProxy(s3_port)) as proxy:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.address, "AWS_CONFIG_FILE": "/dev/null"}.items():
            monkeypatch.setenv(name, value)
        request._s3_client.cache_clear()
        yield proxy
        request._s3_client.cache_clear()


@pytest.fixture
def config(tmp_path):
    return CacheConfig(folder=tmp_path / "cache", max_bytes=900_000, num_fetches=2)


@pytest.fixture
def cache(config):
    with closing(ShardCache(config, FETCH)) as cache:
        yield cache


def remote(number):
    return RemoteFile(join(PLACE, f"video-{number:06d}.tar"), hashlib.sha256(DATA[number]).hexdigest(), 200_000)


def test_two_passes_through_a_bad_network_in_a_cache_of_half_the_size(proxy, config):
    faults = [SLOW_DOWN, reset(700), cut(199_999), stall(500), answer(500), cut(0), SLOW_DOWN, reset(0)]
    proxy.faults = list(faults)
    order = [*range(8), *range(8)]
    # Which of two fetches meets which fault is chance: one file may meet them all.
    patient = FETCH.model_copy(update={"attempts": len(faults) + 1})
    with closing(ShardCache(config, patient)) as cache:
        for position, number in enumerate(order):
            cache.expect([remote(later) for later in order[position : position + 3]])
            with os.fdopen(cache.open(remote(number)), "rb") as file:
                assert file.read() == DATA[number]
        fetched = cache.figures()["fetched_bytes"]
    assert not proxy.faults
    assert len(proxy.requests) <= len(order) + len(faults)
    assert 8 * 200_000 <= fetched <= len(order) * 200_000 + 200_000 * len(faults)


def test_missing_forbidden_and_throttled_are_told_apart(proxy, cache):
    gone = RemoteFile(join(PLACE, "gone.tar"), "0" * 64, 10)
    with pytest.raises(ShardError, match=r"^s3://corpus/some folder/train/gone\.tar: missing: .*404"):
        cache.open(gone)
    proxy.faults = [DENIED]
    with pytest.raises(ShardError, match=r"forbidden: .*AWS_ACCESS_KEY_ID"):
        cache.open(remote(0))
    proxy.faults = [SLOW_DOWN] * 5
    with pytest.raises(ShardError, match=r"throttled: .*at the last of 5 attempts"):
        cache.open(remote(0))
    os.close(cache.open(remote(0)))


def test_a_small_file_is_read_whole(proxy):
    proxy.faults = [SLOW_DOWN]
    assert read_file(join(PLACE, "dataset.json"), FETCH) == b"{}"
    with pytest.raises(ShardError, match=r"^s3://none/dataset\.json: missing: there is no bucket 'none'"):
        read_file("s3://none/dataset.json", FETCH)


def test_a_server_asks_for_time(proxy, cache):
    proxy.faults = [answer(503, b"<Error><Code>SlowDown</Code></Error>", Retry_After="1")]
    start = time.monotonic()
    os.close(cache.open(remote(0)))
    assert time.monotonic() - start >= 1
    assert len(proxy.requests) == 2


def test_stopping_does_not_wait_for_a_slow_server(proxy, tmp_path):
    patient = ShardCache(CacheConfig(folder=tmp_path / "cache"), FetchConfig(timeout_s=20))
    proxy.faults = [stall(100_000)]
    said = []

    def read():
        with pytest.raises(ShardError) as caught:
            patient.open(remote(0))
        said.append(str(caught.value))

    reader = threading.Thread(target=read)
    reader.start()
    while not proxy.requests:
        time.sleep(0.01)
    start = time.monotonic()
    patient.stop()
    reader.join(10)
    assert time.monotonic() - start < 2
    assert said == [f"{remote(0).address}: the shard cache was closed"]
    patient.close()
    assert not list((tmp_path / "cache/partial").iterdir())
