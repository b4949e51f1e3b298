"""The shard cache against real servers: order, bounds, sharing, and what happens when something fails."""

import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from object_server import (
    FaultProxy,
    FileServer,
    answer,
    cut,
    is_silent,
    num_bytes_in,
    reset,
    running,
    silence,
    stall,
)

from alpro_stream.config import validate
from alpro_stream.errors import ShardError
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards import cache as cache_module
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache
from alpro_stream.shards.cache_folder import Held, files_to_remove
from alpro_stream.shards.remote_files import join, read_file

SIZE, NUM_FILES = 100_000, 10
DATA = [random.Random(number).randbytes(SIZE) for number in range(NUM_FILES)]
NAMES = [hashlib.sha256(data).hexdigest() for data in DATA]
LARGE = random.Random(99).randbytes(2_500_000)
FETCH = FetchConfig(backoff_s=0.001, timeout_s=20)
# For a server that falls silent once: others must not seem to.
HASTY = FetchConfig(backoff_s=0.001, timeout_s=1.5)
# Opens every file of a list three times, in an order of its own, and says what came: a rank.
RANK = """
import hashlib, json, os, random, sys
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache
folder, max_bytes, seed, files = json.loads(sys.argv[1])
files = [RemoteFile(*file) for file in files] * (3 if seed else 1)
random.Random(seed).shuffle(files)
cache = ShardCache(CacheConfig(folder=folder, max_bytes=max_bytes, num_fetches=2), FetchConfig(backoff_s=0.001))
for position, file in enumerate(files):
    cache.expect(files[position:position + 4])
    with open(cache.open(file), "rb") as opened:
        assert hashlib.sha256(opened.read()).hexdigest() == file.sha256
cache.close()
"""


# Somebody else, who finds the folder of the first user; what cannot be read before is imported first.
SECOND_USER = """
import json, os, sys
import alpro_stream.media.request, http.client, encodings.idna
from alpro_stream.errors import ShardError
from alpro_stream.media.remote import FetchConfig
from alpro_stream.shards.cache import CacheConfig, RemoteFile, ShardCache
folders, max_bytes, group, umask, files = json.loads(sys.argv[1])
os.setgroups([group])
os.setgid(65534)
os.setuid(65534)
os.umask(umask)
for folder in folders:
    try:
        cache = ShardCache(CacheConfig(folder=folder, max_bytes=max_bytes), FetchConfig())
        for file in files:
            os.close(cache.open(RemoteFile(*file)))
        cache.close()
    except ShardError as error:
        print(error)
"""


@pytest.fixture
def server():
    with running(FileServer({f"/{number}.tar": data for number, data in enumerate(DATA)})) as server:
        yield server


@pytest.fixture
def proxy(server):
    with running(FaultProxy(server.server_port)) as proxy:
        yield proxy


@pytest.fixture
def make(tmp_path):
    """Makes caches in one folder, and closes them."""
    caches = []

    def make(num_files=100, fetch=FETCH, num_fetches=1, **options):
        config = {"folder": tmp_path / "cache", "max_bytes": num_files * SIZE, "num_fetches": num_fetches, **options}
        caches.append(ShardCache(CacheConfig(**config), fetch))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def remote(server, number, num_bytes=SIZE):
    return RemoteFile(f"{server.address}/{number}.tar", NAMES[number], num_bytes)


def read(cache, file):
    with os.fdopen(cache.open(file), "rb") as opened:
        return opened.read()


def here(tmp_path, names=NAMES):
    """Numbers of the whole files."""
    return {names.index(path.name) for path in (tmp_path / "cache/files").iterdir()}


def left_over(tmp_path):
    return [path for kind in ("partial", "users") for path in (tmp_path / "cache" / kind).iterdir()]


def asked(server):
    return [int(path.strip("/").partition(".")[0]) for path, _ in server.requests]


def wait_until(true, seconds=10.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def start_rank(tmp_path, files, *, seed=0, num_files=100):
    told = json.dumps([str(tmp_path / "cache"), num_files * SIZE, seed, files])
    return subprocess.Popen([sys.executable, "-c", RANK, told], stderr=subprocess.PIPE, text=True)


def pause(num_bytes, resumed):
    """The answer stands still after so many bytes, until it goes on."""

    def fault(handler):
        head, body = handler.ask()
        handler.wfile.write(head + body[:num_bytes])
        resumed.wait(30)
        handler.wfile.write(body[num_bytes:])

    return fault


def flip(position):
    """One bit is another one, and nobody notices on the way."""

    def fault(handler):
        head, body = handler.ask()
        handler.wfile.write(head + body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])

    return fault


def in_background(work):
    """What it gives, or the ShardError it ends with, once `join` was called on the thread."""
    results = []

    def run():
        try:
            results.append(work())
        except ShardError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def partial(tmp_path):
    return list((tmp_path / "cache/partial").iterdir())


def failure(cache, file):
    with pytest.raises(ShardError) as caught:
        cache.open(file)
    return str(caught.value)


def test_a_file_is_fetched_once_and_read_from_the_folder(server, make, tmp_path):
    cache = make()
    descriptor = cache.open(remote(server, 0))
    assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptor, b"x")
    os.close(descriptor)
    assert read(cache, remote(server, 0)) == read(make(), remote(server, 0)) == DATA[0]
    assert asked(server) == [0]
    assert cache.figures() == {"fetched_bytes": SIZE}
    assert here(tmp_path) == {0}


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CacheConfig().folder == tmp_path / "alpro-stream/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(validate(CacheConfig, {}, "test").folder).endswith("/.cache/alpro-stream/shards")


def test_files_are_fetched_ahead_in_the_order_of_need(server, make, tmp_path):
    cache = make()
    order = [3, 1, 4, 0]
    cache.expect([remote(server, number) for number in order])
    wait_until(lambda: here(tmp_path) == set(order))
    assert asked(server) == order
    assert [read(cache, remote(server, number)) for number in order] == [DATA[number] for number in order]
    assert len(server.requests) == 4


def test_a_new_order_replaces_the_old_one(proxy, make, tmp_path):
    cache, resumed = make(), threading.Event()
    proxy.faults = [pause(0, resumed)]
    cache.expect([remote(proxy, number) for number in (0, 1, 2)])
    wait_until(lambda: proxy.requests)
    cache.expect([remote(proxy, number) for number in (5, 6)])
    resumed.set()
    wait_until(lambda: here(tmp_path) == {0, 5, 6})
    assert asked(proxy) == [0, 5, 6]


def test_what_is_opened_does_not_wait_for_what_is_fetched_ahead(proxy, make):
    cache = make()
    proxy.faults = [stall(1000)]
    cache.expect([remote(proxy, 0)])
    wait_until(lambda: proxy.requests)
    assert read(cache, remote(proxy, 1)) == DATA[1]


def test_which_files_go_first():
    files = [Held("old", 10, 1), Held("new", 10, 2), Held("soon", 10, 0), Held("late", 10, 0), Held("now", 10, 0)]
    needs = {"now": 0, "soon": 1, "late": 5, "elsewhere": 9}

    def order(num_bytes, later_than):
        chosen = files_to_remove(files, needs, num_bytes, later_than)
        return None if chosen is None else [file.sha256 for file in chosen]

    assert order(0, -1) == []
    assert order(1, -1) == ["old"]
    assert order(50, -1) == ["old", "new", "late", "soon", "now"]
    assert order(51, -1) is None
    assert order(30, 1) == ["old", "new", "late"]
    assert order(31, 1) is None
    assert order(21, 5) is None


def test_opening_removes_what_nobody_needs_then_what_is_needed_last(server, make, tmp_path):
    reader, planner = make(num_files=4), make(num_files=4)
    for number in (0, 1, 2, 3, 0):
        read(reader, remote(server, number))
        time.sleep(0.01)  # times of files are coarse
    planner.expect([remote(server, number) for number in (2, 1)])
    read(reader, remote(server, 4))
    assert here(tmp_path) == {0, 1, 2, 4}, "of those nobody needs, 3 was not used for longest"
    read(reader, remote(server, 5))
    assert here(tmp_path) == {1, 2, 4, 5}
    planner.expect([remote(server, number) for number in (2, 4, 1)])
    reader.expect([remote(server, number) for number in (4, 5)])
    read(reader, remote(server, 6))
    assert here(tmp_path) == {2, 4, 5, 6}, "1 is needed last"


def test_fetching_ahead_never_removes_what_is_needed_sooner(server, make, tmp_path):
    # One thread: of two, the one with the later file may ask for room first, and the file then goes again.
    cache = make(num_files=2, num_fetches=1)
    cache.expect([remote(server, number) for number in (0, 1, 2, 3)])
    wait_until(lambda: here(tmp_path) == {0, 1})
    time.sleep(1.3)  # longer than the pause between two looks
    assert here(tmp_path) == {0, 1}
    assert sorted(asked(server)) == [0, 1]
    cache.expect([remote(server, number) for number in (1, 2, 3)])
    wait_until(lambda: here(tmp_path) == {1, 2})
    assert sorted(asked(server)) == [0, 1, 2]


def test_what_another_process_needs_sooner_stays(server, make, tmp_path):
    theirs, ours = make(num_files=2), make(num_files=2)
    theirs.expect([remote(server, number) for number in (0, 1)])
    wait_until(lambda: here(tmp_path) == {0, 1})
    ours.expect([remote(server, number) for number in (7, 2)])
    wait_until(lambda: here(tmp_path) == {0, 7})  # needed now, 1 is not
    time.sleep(0.3)
    assert here(tmp_path) == {0, 7}
    theirs.close()
    wait_until(lambda: here(tmp_path) == {2, 7})


def test_a_file_that_is_removed_stays_readable_and_is_fetched_again(server, make, tmp_path):
    cache = make(num_files=1)
    descriptor = cache.open(remote(server, 0))
    assert read(cache, remote(server, 1)) == DATA[1]
    assert here(tmp_path) == {1}
    assert os.pread(descriptor, SIZE, 0) == DATA[0]
    os.close(descriptor)
    assert read(cache, remote(server, 0)) == DATA[0]


def test_the_folder_may_be_removed_by_hand(server, make, tmp_path):
    cache = make()
    read(cache, remote(server, 0))
    shutil.rmtree(tmp_path / "cache")
    assert read(cache, remote(server, 0)) == DATA[0]
    cache.expect([remote(server, 1)])
    wait_until(lambda: here(tmp_path) == {0, 1})


@pytest.mark.parametrize("data", [DATA[0], LARGE], ids=["known size", "unknown size"])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_folder_may_be_removed_while_a_file_is_on_its_way(server, proxy, make, data, ahead, tmp_path):
    server.files["/file"] = data
    name = hashlib.sha256(data).hexdigest()
    file = RemoteFile(f"{proxy.address}/file", name, None if data is LARGE else len(data))
    cache, resumed = make(), threading.Event()
    proxy.faults = [pause(10_000, resumed)]
    if ahead:
        cache.expect([file])
    else:
        thread, results = in_background(lambda: read(cache, file))
    wait_until(lambda: any(path.stat().st_size for path in partial(tmp_path)))
    shutil.rmtree(tmp_path / "cache")
    resumed.set()
    if ahead:
        wait_until(lambda: (tmp_path / "cache/files" / name).exists())
    else:
        thread.join(10)
        assert results == [data]
    assert len(proxy.requests) == 2
    assert partial(tmp_path) == []


def test_the_folder_may_be_removed_again_and_again(server, make, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_MOST_REMOVALS", 10_000)  # a slow disk meets many
    caches, done = [make(num_fetches=2) for _ in range(2)], threading.Event()

    def remove():
        while not done.wait(0.05):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    remover, _ = in_background(remove)
    try:
        for number in [*range(NUM_FILES)] * 3:
            for cache in caches:
                cache.expect([remote(server, number), remote(server, (number + 1) % NUM_FILES)])
                assert read(cache, remote(server, number)) == DATA[number]
    finally:
        done.set()
        remover.join()


def test_a_folder_that_is_removed_at_once_each_time_is_an_error(server, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cache_module, "_OPEN_POLL_S", 0.001)
    cache = make(folder="cache")
    (tmp_path / "here").rename(tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
    said = failure(cache, remote(server, 0))
    assert said.startswith("cannot use the shard cache cache: No such file or directory")
    assert "make room" not in said


def test_what_is_read_with_too_small_a_cache_is_not_fetched_again_and_again(server, make, tmp_path, caplog):
    cache = make(num_files=2)
    files = [remote(server, number) for number in (0, 1, 2)]
    with caplog.at_level(logging.WARNING):
        cache.expect(files)
        wait_until(lambda: here(tmp_path) == {0, 1})  # fetching ahead waits for room now
        descriptors = [cache.open(file) for file in files]
        cache.expect(files)
        time.sleep(0.3)
        descriptors += [cache.open(remote(server, 3))]
    assert [os.pread(descriptor, SIZE, 0) for descriptor in descriptors] == DATA[:4]
    for descriptor in descriptors:
        os.close(descriptor)
    assert sorted(asked(server)) == [0, 1, 2, 3]
    (record,) = caplog.records
    assert "raise stream.cache.max_bytes" in record.getMessage()
    assert f"about {3 * SIZE}" in record.getMessage()


def test_what_moves_back_in_the_order_is_fetched_ahead_again(server, make, tmp_path):
    cache = make(num_files=2)
    cache.expect([remote(server, number) for number in (0, 1, 2)])
    read(cache, remote(server, 0))
    cache.expect([remote(server, number) for number in (1, 2, 0)])
    wait_until(lambda: here(tmp_path) == {1, 2})
    cache.expect([remote(server, number) for number in (2, 0)])
    wait_until(lambda: here(tmp_path) == {2, 0})


def test_three_processes_fetch_a_file_once(proxy, tmp_path):
    proxy.faults = [silence(0.9)] * 2
    ranks = [start_rank(tmp_path, [remote(proxy, 0), remote(proxy, 1)]) for _ in range(3)]
    assert [(rank.wait(), rank.stderr.read()) for rank in ranks] == [(0, "")] * 3
    assert sorted(asked(proxy)) == [0, 1]
    assert here(tmp_path) == {0, 1}
    assert left_over(tmp_path) == []


def test_the_bound_holds_while_three_processes_fetch(proxy, make, tmp_path):
    make().close()  # makes the folder
    num_files, folder = 4, tmp_path / "cache"
    proxy.faults = [silence(0.02)] * 1000
    ranks = [
        start_rank(tmp_path, [remote(proxy, number) for number in range(8)], seed=seed, num_files=num_files)
        for seed in (1, 2, 3)
    ]
    seen = []
    while any(rank.poll() is None for rank in ranks):
        seen.append(num_bytes_in(folder, "files", "partial"))
        time.sleep(0.002)
    assert [(rank.wait(), rank.stderr.read()) for rank in ranks] == [(0, "")] * 3
    assert 2 * SIZE < max(seen) <= num_files * SIZE
    assert not list((folder / "partial").iterdir())


def test_another_cache_in_the_folder_is_not_disturbed(proxy, make, tmp_path):
    ours, theirs = make(), make()
    proxy.faults = [silence(0.5)]
    theirs.expect([remote(proxy, 0)])
    wait_until(lambda: proxy.requests)
    ours.expect([remote(proxy, 1)])
    read(ours, remote(proxy, 1))
    ours.close()
    assert read(theirs, remote(proxy, 0)) == DATA[0]
    assert sorted(asked(proxy)) == [0, 1]
    theirs.close()
    assert left_over(tmp_path) == []


def test_of_several_bounds_the_largest_counts_while_its_run_lives(server, make, tmp_path):
    ours = make(num_files=8)
    ours.expect([remote(server, number) for number in range(4)])
    wait_until(lambda: here(tmp_path) == {0, 1, 2, 3})
    theirs = start_rank(tmp_path, [remote(server, number) for number in range(4, 10)], seed=1, num_files=2)
    assert (theirs.wait(), theirs.stderr.read()) == (0, "")
    assert here(tmp_path) >= {0, 1, 2, 3}
    assert len(here(tmp_path)) == 8
    assert sorted(set(asked(server))) == list(range(10))
    assert [asked(server).count(number) for number in range(4)] == [1] * 4
    ours.close()
    theirs = start_rank(tmp_path, [remote(server, 9)], num_files=2)
    assert theirs.wait() == 0
    read(make(num_files=2), remote(server, asked(server)[-1]))
    small = make(num_files=2)
    (missing,) = list({*range(10)} - here(tmp_path))[:1]
    read(small, remote(server, missing))
    assert len(here(tmp_path)) == 2, "the larger bound ended with its run"


def test_what_another_run_removed_is_fetched_again_unasked(server, make, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_LOOK_AGAIN_S", 0.1)
    cache = make()
    cache.expect([remote(server, number) for number in (0, 1)])
    wait_until(lambda: here(tmp_path) == {0, 1})
    read(cache, remote(server, 0))
    for path in (tmp_path / "cache/files").iterdir():
        path.unlink()
    wait_until(lambda: here(tmp_path) == {1})
    time.sleep(0.3)
    assert asked(server) == [0, 1, 1], "0 is open, and is not needed again"


def test_no_more_is_told_than_twice_what_fits(server, make, tmp_path):
    cache = make(num_files=2)
    cache.expect([remote(server, number) for number in range(NUM_FILES)])
    (user,) = (tmp_path / "cache/users").iterdir()
    assert json.loads(user.read_text()) == {"max_bytes": 2 * SIZE, "order": NAMES[:4]}


def test_many_small_files_of_unknown_size(proxy, server, make, tmp_path):
    """The indexes of a data set: fetched side by side, and the shards that are here stay."""
    small = [random.Random(number).randbytes(1000) for number in range(200)]
    server.files |= {f"/{number}.idx": data for number, data in enumerate(small)}
    files = [
        RemoteFile(f"{proxy.address}/{number}.idx", hashlib.sha256(data).hexdigest(), None)
        for number, data in enumerate(small)
    ]
    cache = make(max_bytes=3 * SIZE + 600_000, num_fetches=4)
    for number in range(3):
        read(cache, remote(server, number))
    together = threading.Barrier(4)

    def wait_for_others(handler):
        together.wait(10)
        handler.wfile.write(b"".join(handler.ask()))

    proxy.faults = [wait_for_others] * 8
    cache.expect(files)
    wait_until(lambda: len(proxy.requests) >= 8)
    assert [read(cache, file) for file in files] == small
    assert not together.broken
    assert len(proxy.requests) == len(files)
    names = {path.name for path in (tmp_path / "cache/files").iterdir()}
    assert names == {file.sha256 for file in files} | set(NAMES[:3])


def test_the_sum_of_sizes_is_counted_anew_where_it_is_lost_or_wrong(server, make, tmp_path):
    cache = make(num_files=3)
    for number in range(3):
        read(cache, remote(server, number))
        time.sleep(0.01)
    assert (tmp_path / "cache/num_bytes").read_text() == str(3 * SIZE)
    (tmp_path / "cache/files" / NAMES[1]).unlink()
    read(cache, remote(server, 3))
    assert here(tmp_path) == {0, 2, 3}, "there was room"
    for contents in (b"", b"?"):
        (tmp_path / "cache/num_bytes").write_bytes(contents)
        read(cache, remote(server, 4 + len(contents)))
        assert len(here(tmp_path)) == 3
    (tmp_path / "cache/num_bytes").write_text("0")
    read(make(num_files=3), remote(server, 6))
    assert len(here(tmp_path)) == 3


def test_a_bit_that_flips_on_its_way_costs_one_request(proxy, make, tmp_path):
    proxy.faults = [flip(5)]
    assert read(make(), remote(proxy, 0)) == DATA[0]
    assert asked(proxy) == [0, 0]
    proxy.faults = [flip(5), flip(6)]
    said = failure(make(), remote(proxy, 1))
    assert asked(proxy) == [0, 0, 1, 1]
    flipped = [hashlib.sha256(DATA[1][:at] + bytes([DATA[1][at] ^ 1]) + DATA[1][at + 1 :]).hexdigest() for at in (5, 6)]
    found = " then ".join(f"sha256 {digest} ({SIZE} bytes)," for digest in flipped)
    assert f"found {found} expected sha256 {NAMES[1]}" in said
    assert here(tmp_path) == {0}


def test_contents_of_another_digest_are_not_taken(server, make, tmp_path):
    cache = make()
    server.files["/0.tar"] = DATA[1]
    said = failure(cache, remote(server, 0))
    assert NAMES[0] in said
    assert NAMES[1] in said
    assert f"{server.address}/0.tar" in said
    assert asked(server) == [0, 0]
    assert "twice" in said
    assert "changed after its dataset.json was read" in said
    assert here(tmp_path) == set()
    assert not list((tmp_path / "cache/partial").iterdir())
    server.files["/0.tar"] = DATA[0] + b"x"
    assert f"expected sha256 {NAMES[0]} ({SIZE} bytes)" in failure(cache, remote(server, 0))
    server.files["/0.tar"] = DATA[0]
    assert read(cache, remote(server, 0)) == DATA[0]


THROTTLED = answer(503, Retry_After="0")


@pytest.mark.parametrize(
    "faults",
    [[THROTTLED], [reset(700)], [cut(50_000)], [answer(500), cut(0), reset(99_999), THROTTLED], [stall(500)]],
    ids=["throttled", "reset", "short", "four in a row", "stall"],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_faults_of_the_network_cost_one_request_each(proxy, make, faults, ahead, tmp_path):
    cache = make(fetch=HASTY if any(map(is_silent, faults)) else FETCH)
    proxy.faults = list(faults)
    if ahead:
        cache.expect([remote(proxy, 0)])
        wait_until(lambda: here(tmp_path) == {0})
    assert read(cache, remote(proxy, 0)) == DATA[0]
    assert len(proxy.requests) == len(faults) + 1


def test_a_server_without_ranges_starts_over(server, proxy, make):
    server.ranges = False
    proxy.faults = [cut(50_000)]
    assert read(make(), remote(proxy, 0)) == DATA[0]
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    ("fault", "num_requests", "word"),
    [(answer(404), 1, "missing"), (answer(403), 1, "forbidden"), (THROTTLED, 5, "throttled"), (cut(9), 5, "cut short")],
)
def test_what_cannot_be_fetched_is_named_and_tried_again_later(server, proxy, make, fault, num_requests, word):
    server.files["/0.tar?signature=secret"] = DATA[0]
    cache = make()
    address, name, size = remote(proxy, 0)
    secret = RemoteFile(f"{address}?signature=secret", name, size)
    proxy.faults = [fault] * num_requests
    said = failure(cache, secret)
    assert said.startswith(f"{address}: {word}")
    assert "secret" not in said
    assert len(proxy.requests) == num_requests
    assert read(cache, secret) == DATA[0]


def test_a_failure_of_fetching_ahead_waits_for_the_one_who_opens(proxy, make, tmp_path):
    cache = make()
    proxy.faults = [answer(404)]
    cache.expect([remote(proxy, 0), remote(proxy, 1)])
    wait_until(lambda: here(tmp_path) == {1})
    cache.expect([remote(proxy, 0), remote(proxy, 1), remote(proxy, 2)])
    wait_until(lambda: here(tmp_path) == {1, 2})
    assert "missing" in failure(cache, remote(proxy, 0))
    assert asked(proxy) == [0, 1, 2]
    assert read(cache, remote(proxy, 0)) == DATA[0]


def test_a_failure_that_passes_is_tried_once_more_by_the_one_who_opens(proxy, make, tmp_path):
    cache = make()
    proxy.faults = [THROTTLED] * 5
    cache.expect([remote(proxy, 0), remote(proxy, 1)])
    wait_until(lambda: here(tmp_path) == {1})
    assert read(cache, remote(proxy, 0)) == DATA[0]
    assert asked(proxy) == [0] * 5 + [1, 0]


def test_a_file_larger_than_the_cache(server, make):
    cache = make(max_bytes=SIZE - 1)
    server.files["/index"] = LARGE
    for file in (remote(server, 0), RemoteFile(f"{server.address}/index", hashlib.sha256(LARGE).hexdigest(), None)):
        said = failure(cache, file)
        assert f"cache.max_bytes={SIZE - 1}" in said
        assert "raise stream.cache.max_bytes" in said
    assert str(SIZE) in failure(cache, remote(server, 0))
    cache.expect([remote(server, 0)])
    time.sleep(0.1)
    assert "raise stream.cache.max_bytes" in failure(cache, remote(server, 0))
    assert [path for path, _ in server.requests] == ["/index"]


@pytest.mark.parametrize("max_bytes", [2_500_000, 50_000_000])
def test_a_file_of_unknown_size(server, make, max_bytes, tmp_path):
    server.files["/index"], server.length = LARGE, "chunked"
    name = hashlib.sha256(LARGE).hexdigest()
    cache = make(max_bytes=max_bytes)
    read(cache, remote(server, 0))
    assert read(cache, RemoteFile(f"{server.address}/index", name, None)) == LARGE
    kept = {path.name for path in (tmp_path / "cache/files").iterdir()}
    assert len(server.requests) == 2, "it was started over for want of room"
    assert kept == ({name} if max_bytes == len(LARGE) else {name, NAMES[0]})


def test_a_large_shard_is_no_error_where_media_of_its_size_are(server, make):
    cache = make(fetch=FetchConfig(max_bytes=1000))
    assert read(cache, remote(server, 0)) == DATA[0]


@pytest.mark.parametrize("fault", [stall(1000), stall(0)])
def test_closing_in_the_middle_of_a_fetch(proxy, make, fault, tmp_path):
    cache = make(num_fetches=2)

    def late(handler):
        cache._stopped.wait(30)
        time.sleep(0.1)
        handler.wfile.write(b"".join(handler.ask()))

    proxy.faults = [fault, late]
    cache.expect([remote(proxy, number) for number in (0, 1)])
    wait_until(lambda: len(proxy.requests) == 2)
    start = time.monotonic()
    cache.close()
    cache.close()
    assert time.monotonic() - start < 3
    assert left_over(tmp_path) == []
    assert "closed" in failure(cache, remote(proxy, 0))
    assert read(make(), remote(proxy, 0)) == DATA[0], "what was cut off is nobody's any more"
    proxy.released.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("shard-fetch")])
    assert here(tmp_path) == {0}


@pytest.mark.parametrize("fault", [stall(1000), answer(503, Retry_After="20")], ids=["silent", "wait"])
def test_stopping_ends_who_waits_for_a_slow_server_or_for_another(proxy, make, fault, tmp_path):
    first, second = make(), make()
    proxy.faults = [fault]
    waits = [in_background(lambda: first.open(remote(proxy, 0)))]
    wait_until(lambda: proxy.requests)
    waits.append(in_background(lambda: second.open(remote(proxy, 0))))
    time.sleep(0.1)
    start = time.monotonic()
    second.stop()
    first.stop()
    assert time.monotonic() - start < 5, "it returns at once"
    for thread, results in waits:
        thread.join(10)
        assert str(results[0]) == f"{proxy.address}/0.tar: the shard cache was closed"
    assert time.monotonic() - start < 8
    first.expect([remote(proxy, 1)])
    assert "closed" in failure(first, remote(proxy, 1))
    assert asked(proxy) == [0]
    proxy.released.set()
    first.close()
    second.close()
    assert left_over(tmp_path) == []


def test_what_arrives_is_counted_before_the_file_is_whole(proxy, make):
    cache, resumed = make(), threading.Event()
    proxy.faults = [pause(30_000, resumed)]
    thread, results = in_background(lambda: read(cache, remote(proxy, 0)))
    wait_until(lambda: cache.figures()["fetched_bytes"] == 30_000)
    resumed.set()
    thread.join(10)
    assert results == [DATA[0]]
    assert cache.figures() == {"fetched_bytes": SIZE}


def test_who_waits_for_a_fetch_that_fails_takes_over(proxy, make):
    first, second = make(fetch=FetchConfig(attempts=1)), make()
    proxy.faults = [lambda handler: (time.sleep(0.5), answer(503)(handler))]
    first.expect([remote(proxy, 0)])
    wait_until(lambda: proxy.requests)
    assert read(second, remote(proxy, 0)) == DATA[0]
    assert len(proxy.requests) == 2


@pytest.fixture
def disk(tmp_path):
    """A small file system where the cache will be."""
    folder = tmp_path / "cache"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(disk, server, make, tmp_path):
    cache = make(num_fetches=3)
    cache.expect([remote(server, number) for number in range(6)])
    for number in (0, 1, 2, 3, 4):
        assert read(cache, remote(server, number)) == DATA[number], "older files make room"
    cache.expect([])
    wait_until(lambda: not list((disk / "partial").iterdir()))
    for path in (disk / "files").iterdir():
        path.unlink()
    space = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - SIZE // 2))
    said = failure(cache, remote(server, 7))
    assert str(disk) in said
    assert "cache.max_bytes" in said
    assert "No space left" in said
    assert not list((disk / "partial").iterdir())
    (disk / "ballast").unlink()
    assert read(cache, remote(server, 7)) == DATA[7]


def test_a_folder_that_cannot_be_made(tmp_path, make):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    for folder, words in (
        ("file/cache", rf"Not a directory \({tmp_path}/file\)"),
        ("file", rf"Not a directory \({tmp_path}/file\)"),
        ("link", rf"File exists \({tmp_path}/link is a link to nowhere, which is not there\)"),
    ):
        with pytest.raises(ShardError, match=f"cannot use the shard cache {tmp_path}/{folder}: {words}") as caught:
            make(folder=tmp_path / folder)
        assert str(caught.value).endswith("; set stream.cache.folder to one that can be written")


@pytest.fixture
def shared():
    """A folder that all users may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "cache"


def run_second_user(folders, files, *, num_files=100, group=65534, umask=0o022):
    told = json.dumps([[str(folder) for folder in folders], num_files * SIZE, group, umask, files])
    return subprocess.run([sys.executable, "-c", SECOND_USER, told], capture_output=True, text=True)


def test_a_folder_of_another_user(shared, server, make):
    make(folder=shared).close()
    closed = shared.parent / "closed"
    closed.mkdir(0o700)
    folders = [shared, shared.parent / "another", closed / "cache"]
    there, below, inside = run_second_user(folders, []).stdout.splitlines()
    expected = f"cannot use the shard cache {shared}: Permission denied ({shared}/lock belongs to root;"
    assert there.startswith(expected)
    assert "set stream.cache.folder" in there
    assert "make room" not in there
    assert f"Permission denied ({shared.parent} belongs to root;" in below
    assert f"Permission denied ({closed} belongs to root;" in inside


def test_two_users_of_one_group_share_a_folder(shared, server, make, tmp_path):
    group = 4321
    shared.mkdir()
    os.chown(shared, -1, group)
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        first = make(folder=shared, num_files=2)
        read(first, remote(server, 0))
        (shared / "users/dead.json").write_text("")
        (shared / "users/dead.json").chmod(0o600)
        files = [remote(server, number) for number in (0, 1, 2)]
        second = run_second_user([shared], files, num_files=2, group=group, umask=0o002)
        assert (second.stdout, second.stderr) == ("", "")
        assert asked(server) == [0, 1, 2]
        assert read(first, remote(server, 3)) == DATA[3]
        assert len(list((shared / "files").iterdir())) == 2
    finally:
        os.umask(before)


def test_reading_a_small_file(server, proxy, tmp_path):
    (tmp_path / "dataset.json").write_bytes(b"{}")
    assert read_file(str(tmp_path / "dataset.json"), FETCH) == b"{}"
    assert read_file(f"{proxy.address}/0.tar", FETCH) == DATA[0]
    with pytest.raises(ShardError, match=rf"{tmp_path}/none: missing"):
        read_file(f"{tmp_path}/none", FETCH)
    with pytest.raises(ShardError, match="Is a directory"):
        read_file(str(tmp_path), FETCH)
    for fault, word in ((answer(404), "missing"), (answer(403), "forbidden"), (THROTTLED, "throttled")):
        proxy.faults = [fault] * 5
        with pytest.raises(ShardError) as caught:
            read_file(f"{proxy.address}/0.tar?secret", FETCH)
        assert str(caught.value).startswith(f"{proxy.address}/0.tar: {word}")
        proxy.faults = []
    proxy.faults = [cut(77)]
    assert read_file(f"{proxy.address}/0.tar", FETCH) == DATA[0]


def test_joining_places():
    assert join("/data/train", "a.tar") == join("/data/train/", "a.tar") == "/data/train/a.tar"
    assert join("s3://bucket/what?/", "a.tar") == "s3://bucket/what?/a.tar"
    assert join("http://host/train/?key=a/b", "a.tar") == "http://host/train/a.tar?key=a/b"
