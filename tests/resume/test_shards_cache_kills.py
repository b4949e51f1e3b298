"""A process that is killed while it fetches a shard: others of its folder go on, and nothing of it is left."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from object_server import FaultProxy, FileServer, running, stall

DATA = [random.Random(number).randbytes(300_000) for number in range(3)]
FETCHER = """
import json, sys, time
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache
folder, ahead, file = json.loads(sys.argv[1])
cache = ShardCache(CacheConfig(folder=folder), FetchConfig())
if ahead:
    cache.expect([RemoteFile(*file)])
    time.sleep(60)
cache.open(RemoteFile(*file))
"""


@pytest.fixture
def proxy():
    files = {f"/{number}.tar": data for number, data in enumerate(DATA)}
    with running(FileServer(files)) as server, running(FaultProxy(server.server_port)) as proxy:
        yield proxy


@pytest.fixture
def make(tmp_path):
    caches = []

    def make(**options):
        caches.append(ShardCache(CacheConfig(folder=tmp_path, **options), FetchConfig(backoff_s=0.001)))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def remote(proxy, number):
    return RemoteFile(f"{proxy.address}/{number}.tar", hashlib.sha256(DATA[number]).hexdigest(), len(DATA[number]))


def names(folder, kind):
    return sorted(path.name for path in (folder / kind).iterdir())


@contextlib.contextmanager
def fetcher(folder, proxy, *, ahead):
    """A process that is in the middle of a fetch, and will stay there."""
    proxy.faults = [stall(100_000)]
    told = json.dumps([str(folder), ahead, remote(proxy, 0)])
    process = subprocess.Popen([sys.executable, "-c", FETCHER, told])
    try:
        until = time.monotonic() + 20
        while not any(path.stat().st_size for path in folder.glob("partial/*")):
            assert time.monotonic() < until, "nothing was fetched"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ahead", [False, True])
def test_another_process_takes_over_what_a_killed_one_was_fetching(proxy, make, tmp_path, ahead):
    with fetcher(tmp_path, proxy, ahead=ahead) as killed:
        cache, opened = make(), []
        waiting = threading.Thread(target=lambda: opened.append(cache.open(remote(proxy, 0))))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive(), "it did not wait for the other"
        assert len(proxy.requests) == 1
        killed.kill()
        waiting.join(10)
    assert os.pread(opened[0], 1 << 20, 0) == DATA[0]
    os.close(opened[0])
    assert len(proxy.requests) == 2
    assert names(tmp_path, "partial") == []
    assert names(tmp_path, "files") == [remote(proxy, 0).sha256]


def test_a_later_run_removes_what_a_killed_one_left(proxy, make, tmp_path):
    with fetcher(tmp_path, proxy, ahead=True):
        pass
    assert len(names(tmp_path, "partial")) == len(names(tmp_path, "users")) == 1
    cache = make()
    assert names(tmp_path, "partial") == []
    assert len(names(tmp_path, "users")) == 1
    cache.close()
    assert names(tmp_path, "users") == []


def test_the_order_of_a_killed_process_binds_nobody(proxy, make, tmp_path):
    with fetcher(tmp_path, proxy, ahead=True):
        cache = make(max_bytes=700_000)
        told = [json.loads(path.read_text()) for path in (tmp_path / "users").iterdir()]
        assert {"max_bytes": 200 << 30, "order": [remote(proxy, 0).sha256]} in told
    os.close(cache.open(remote(proxy, 0)))
    os.close(cache.open(remote(proxy, 1)))
    cache.expect([remote(proxy, 1), remote(proxy, 2)])
    until = time.monotonic() + 10
    while names(tmp_path, "files") != sorted(remote(proxy, number).sha256 for number in (1, 2)):
        assert time.monotonic() < until, "the file that only a dead process needs was spared"
        time.sleep(0.01)
