"""Runs that are killed in the middle of fetching or decoding: nothing is left, and others are not disturbed."""

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "resume"))

from dying_runs import assert_same_run, config, training
from object_server import CREDENTIALS, FaultProxy, running, s3_server, stall
from stream_parts import stored_as, write_clips

from alpro_stream.media import FetchConfig, request
from alpro_stream.run import train
from alpro_stream.shards.cache import CacheConfig, ShardCache
from alpro_stream.shards.entities import save_entities
from alpro_stream.shards.layout import ENTITIES_FILE
from alpro_stream.stream import isolated
from alpro_stream.testing.shards import NOUNS, picture, write_tokenizer

pytest.importorskip("moto.server")

NUM_FILES = 2 * 6
SHARED = Path("/dev/shm")
# Frames that are no plain JPEG are decoded in a process, which says so and then never ends.
HANGING = """
import sys, time
from pathlib import Path
from alpro_stream.stream import isolated_process

def hang(request, buffer):
    Path(__file__).with_name("decoding").touch()
    while True:
        pass

isolated_process._decode_pictures = hang
isolated_process.main(sys.argv[1:])
"""


def frames_of(number):
    """Every third clip is progressive, so that each run has a process that decodes."""
    frames = [picture(number, frame, 64) for frame in range(2)]
    return [stored_as(one, progressive=True) for one in frames] if number % 3 == 0 else frames


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_clips(root / "train", (6, 5, 6, 7, 4, 6), frames_of, 64)
    save_entities(root / "train" / ENTITIES_FILE, [(noun, 4) for noun in NOUNS])
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def s3_port(root):
    files = {f"train/{path.name}": path.read_bytes() for path in sorted((root / "train").iterdir())}
    with s3_server({"corpus": files}) as port:
        yield port


@pytest.fixture
def proxies(s3_port):
    """One for each of two runs."""
    with running(FaultProxy(s3_port)) as one, running(FaultProxy(s3_port)) as other:
        yield one, other
    request._s3_client.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(SHARED.iterdir())
    yield
    assert decoders_of(os.getpid()) == []
    wait_until(lambda: not unused(set(SHARED.iterdir()) - before), "shared memory is left behind")


def decoders_of(pid):
    """Decoders that a process started; when it was killed, they are no longer its children."""
    modules = {"alpro_stream.stream.isolated_process", "hanging_decoder"}
    commands = [process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if modules & set(command) and command[-1] == str(pid)]


def unused(names):
    """Names of shared memory that no process has: others on this machine may have some of their own."""
    maps = ""
    for path in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            maps += path.read_text()
    return [path for path in names if str(path) not in maps]


def run_config(root, folder, cache, place="s3://corpus/train", **changes):
    values = {
        "stream.sources": [{"path": place, "kind": "video"}],
        "stream.cache.folder": str(cache),
        "stream.fetch": {"backoff_s": 0.001, "timeout_s": 20.0},
        "train.max_steps": 4,
        "train.checkpoint_every": 2,
        **changes,
    }
    return config(root, folder, **values)


def reach_s3(address):
    os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": address, "AWS_CONFIG_FILE": "/dev/null"})
    request._s3_client.cache_clear()


def reach_s3_and_hang(address, folder):
    reach_s3(address)
    sys.path.insert(0, str(folder))
    isolated._PROCESS_MODULE = "hanging_decoder"


@pytest.fixture
def here(monkeypatch):
    """Training in this process leaves the environment as it was."""
    for name in (*CREDENTIALS, "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "")
    return reach_s3


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """The local run."""
    run = run_config(root, tmp_path_factory.mktemp("local"), "unused", str(root / "train"))
    train(run)
    return run.run_dir


def wait_until(condition, what):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def is_fetching(proxy, cache):
    """Whether a run is in the middle of a file, of which nothing more comes."""
    return not proxy.faults and any((cache / "partial").glob("*"))


def pass_on(handler):
    handler.wfile.write(b"".join(handler.ask()))


def orders(cache):
    """Of the users of a cache that have said what they will read."""
    return [path for path in (cache / "users").iterdir() if len(path.read_text()) > 2]


def names(cache, kind):
    return sorted(path.name for path in (cache / kind).iterdir())


def test_killed_in_a_fetch_nothing_is_left_and_the_same_command_goes_on(root, proxies, here, undisturbed, tmp_path):
    proxy, cache = proxies[0], tmp_path / "cache"
    run = run_config(root, tmp_path / "run", cache)
    # The description goes through and another file, and of the third some bytes.
    proxy.faults = [pass_on, pass_on, stall(700)]
    with training(run, reach_s3, proxy.address) as process:
        wait_until(lambda: is_fetching(proxy, cache), "nothing was fetched")
        process.kill()
        process.join()
    assert names(cache, "partial")
    assert names(cache, "users")
    assert decoders_of(process.pid) == []
    here(proxy.address)
    train(run)
    assert_same_run(run.run_dir, undisturbed)
    assert names(cache, "partial") == names(cache, "users") == []
    assert len(names(cache, "files")) == NUM_FILES


def test_killed_in_the_middle_of_decoding_nothing_is_left(root, proxies, here, undisturbed, tmp_path):
    proxy, cache = proxies[0], tmp_path / "cache"
    (tmp_path / "hanging_decoder.py").write_text(HANGING)
    run = run_config(root, tmp_path / "run", cache, **{"stream.decode.deadline_s": 300.0})
    with training(run, reach_s3_and_hang, proxy.address, tmp_path) as process:
        wait_until((tmp_path / "decoding").exists, "nothing was decoded")
        assert decoders_of(process.pid)
        process.kill()
        process.join()
        wait_until(lambda: not decoders_of(process.pid), "a decoder outlived its run")
    here(proxy.address)
    train(run)
    assert_same_run(run.run_dir, undisturbed)
    assert names(cache, "partial") == names(cache, "users") == []


def test_a_second_run_on_the_node_is_not_disturbed_when_the_first_is_killed(root, proxies, undisturbed, tmp_path):
    """The first is in the middle of a file that the second waits for."""
    cache = tmp_path / "cache"
    first, second = (run_config(root, tmp_path / name, cache) for name in ("first", "second"))
    proxies[0].faults = [pass_on, stall(700), stall(700)]
    with training(first, reach_s3, proxies[0].address) as killed:
        wait_until(lambda: is_fetching(proxies[0], cache), "nothing was fetched")
        with training(second, reach_s3, proxies[1].address) as other:
            wait_until(lambda: len(orders(cache)) == 2, "the second run did not begin")
            assert other.is_alive()
            killed.kill()
            killed.join()
            other.join(120)
            assert other.exitcode == 0
    assert_same_run(second.run_dir, undisturbed)
    assert names(cache, "partial") == []
    assert len(names(cache, "files")) == NUM_FILES
    # Of the killed one only a line is left, which the next user of the folder removes.
    ShardCache(CacheConfig(folder=cache), FetchConfig()).close()
    assert names(cache, "users") == []


@pytest.mark.slow
def test_two_runs_at_once_fetch_each_file_once(root, proxies, undisturbed, tmp_path):
    cache = tmp_path / "cache"
    runs = [run_config(root, tmp_path / name, cache) for name in ("first", "second")]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(training(run, reach_s3, proxy.address))
            for run, proxy in zip(runs, proxies, strict=True)
        ]
        for process in started:
            process.join(120)
            assert process.exitcode == 0
    for run in runs:
        assert_same_run(run.run_dir, undisturbed)
    asked = [path.rpartition("/")[2] for proxy in proxies for path, _ in proxy.requests]
    assert asked.count("dataset.json") == 2
    asked = [name for name in asked if name != "dataset.json"]
    assert len(asked) == len(set(asked)) == NUM_FILES
    assert names(cache, "partial") == names(cache, "users") == []
