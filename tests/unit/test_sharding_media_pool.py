"""Media processes: real files, real servers that stall, real kills."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from media_files import constant_rate, write_image, write_video

from alpro_sharding.filters import FilterConfig
from alpro_sharding.media_messages import (
    LimitConfig,
    MediaAnswer,
    MediaFailure,
    MediaOptions,
    MediaRequest,
)
from alpro_sharding.media_pool import MediaPool, _Process
from alpro_stream.errors import ShardError
from alpro_stream.media import FetchConfig, FrameConfig, VideoConfig


def options(payload="frames", filters=None, fetch=None, **limits):
    return MediaOptions(
        payload=payload,
        frames=FrameConfig(size=32),
        video=VideoConfig(),
        filters=filters or FilterConfig(),
        fetch=fetch or FetchConfig(),
        limits=LimitConfig(**limits),
    )


def request(place, kind="video"):
    return MediaRequest(str(place), None, kind, None, None)


def outcomes(pool, *requests):
    return [outcome for _, outcome in pool.outcomes((None, each) for each in requests)]


class Alternating:
    """Pixels of frames that differ all over from one to the next."""

    def __init__(self):
        self._frames = np.random.default_rng(0).integers(0, 255, (2, 368, 640, 3), np.uint8)

    def __getitem__(self, index):
        return self._frames[index % 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    return {
        "short": write_video(folder / "short.mp4", constant_rate(6, 6)),
        "long": write_video(folder / "long.mp4", constant_rate(600, 50), width=640, height=368, pixels=Alternating()),
        "picture": write_image(folder / "picture.png"),
    }


def test_outcomes_come_in_the_order_of_the_requests(files, tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    asked = [request(files["long"]), None, request(files["picture"], "image"), request(tmp_path / "text.mp4")]
    asked += [request(files["short"])] * 5
    with MediaPool(options(), 3) as pool:
        found = [
            (item, outcome.source.num_frames if isinstance(outcome, MediaAnswer) else outcome)
            for item, outcome in pool.outcomes(enumerate(asked))
        ]
    assert [item for item, _ in found] == list(range(9))
    values = [value for _, value in found]
    assert values[:3] == [600, None, 1]
    assert isinstance(values[3], MediaFailure)
    assert values[3].stage == "probe"
    assert values[4:] == [6] * 5


def test_members_are_the_encoded_frames_and_times_and_digest_are_those_of_the_file(files):
    with MediaPool(options(), 2) as pool:
        for _, answer in pool.outcomes([(None, request(files["short"])), (None, request(files["picture"], "image"))]):
            jpegs = [member.read() for member in answer.members]
            assert all(jpeg.startswith(b"\xff\xd8") and jpeg.endswith(b"\xff\xd9") for jpeg in jpegs)
            assert [member.extension for member in answer.members] == [f"{n:03d}.jpg" for n in range(len(jpegs))]
            assert len(answer.timestamps_s) == len(jpegs)
            assert len(answer.sha256) == 64


def test_a_stored_video_is_the_file_itself(files):
    with MediaPool(options(payload="video"), 2) as pool:
        for _, answer in pool.outcomes([(None, request(files["short"]))]):
            (member,) = answer.members
            with member.open() as file:
                assert file.read() == files["short"].read_bytes()
    assert member.extension == "mp4"


@pytest.fixture
def silent_server():
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4"


def _accept(server):
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(server.accept())


def test_a_fetch_that_takes_too_long_is_ended(files, silent_server):
    with MediaPool(options(fetch_s=0.5, fetch=FetchConfig(timeout_s=60)), 2) as pool:
        list(outcomes(pool, request(files["short"])))  # processes are up
        started = time.monotonic()
        (failure,) = outcomes(pool, request(silent_server))
    assert (failure.stage, "limits.fetch_s" in failure.reason) == ("fetch", True)
    assert time.monotonic() - started < 20


@pytest.fixture
def kill(monkeypatch):
    """Makes processes die, or stand still, when they say that they decode a certain file, so many times."""
    ask, receive = _Process.ask, _Process.receive
    places, killed = {}, []

    def kill(place, times, how=signal.SIGKILL):
        def ask_and_note(self, wanted):
            places[self] = wanted.place
            ask(self, wanted)

        def receive_and_kill(self):
            said = receive(self)
            if said is None and self.stage == "decode" and places[self] == str(place) and len(killed) < times:
                killed.append(self._popen.pid)
                os.kill(self._popen.pid, how)
            return said

        monkeypatch.setattr(_Process, "ask", ask_and_note)
        monkeypatch.setattr(_Process, "receive", receive_and_kill)
        return killed

    return kill


def test_a_decode_that_takes_too_long_is_ended_and_the_others_go_on(files, kill):
    with MediaPool(options(decode_s=2.0), 2) as pool:
        kill(files["long"], 2, signal.SIGSTOP)
        slow, quick = outcomes(pool, request(files["long"]), request(files["picture"], "image"))
    assert slow.stage == "decode"
    assert "limits.decode_s" in slow.reason
    assert "2 times" in slow.reason
    assert isinstance(quick, MediaAnswer)


def test_a_process_that_is_killed_is_replaced_and_its_file_read_again(files, kill):
    with MediaPool(options(), 2) as pool:
        killed = kill(files["long"], 1)
        (answer,) = outcomes(pool, request(files["long"]))
    assert len(killed) == 1
    assert isinstance(answer, MediaAnswer)


def test_a_file_that_kills_every_process_is_one_failure(files, kill):
    with MediaPool(options(), 2) as pool:
        killed = kill(files["long"], 9)
        failure, fine = outcomes(pool, request(files["long"]), request(files["short"]))
    assert len(set(killed)) == 2
    assert isinstance(failure, MediaFailure)
    assert f"ended by signal {signal.SIGKILL.value}" in failure.reason
    assert isinstance(fine, MediaAnswer)


def test_memory_beyond_the_limit_is_a_failure_of_the_file(files, tmp_path):
    picture = write_image(tmp_path / "large.png", size=(7000, 5000))
    with MediaPool(options(memory_mb=200), 2) as pool:
        failure, fine = outcomes(pool, request(picture, "image"), request(files["short"]))
    assert isinstance(failure, MediaFailure)
    assert "limits.memory_mb=200" in failure.reason
    assert isinstance(fine, MediaAnswer)


def test_a_filter_is_a_stage_of_its_own(files):
    with MediaPool(options(filters=FilterConfig(min_duration_s=50)), 2) as pool:
        (failure,) = outcomes(pool, request(files["short"]))
    assert failure.stage == "filter"
    assert failure.reason.startswith("duration: ")


_WORKER = """
import sys, time
sys.path[:0] = {path!r}
from test_sharding_media_pool import options, request
from alpro_sharding.media_pool import MediaPool
pool = MediaPool(options(), 2)
for _, outcome in pool.outcomes((None, request({place!r})) for _ in range(1000)):
    print("one", flush=True)
"""


def test_when_the_worker_is_killed_its_processes_end_and_leave_no_file(files, tmp_path):
    code = _WORKER.format(path=[str(Path(__file__).parent)], place=str(files["long"]))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdout.readline() == b"one\n"
        children = psutil.Process(worker.pid).children(recursive=True)
        assert len(children) == 2
        worker.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_leaving_early_ends_what_is_under_way_and_the_pool_can_be_used_again(files):
    with MediaPool(options(), 2) as pool:
        for _ in pool.outcomes((None, request(files["long"])) for _ in range(10)):
            break
        (answer,) = outcomes(pool, request(files["short"]))
    assert isinstance(answer, MediaAnswer)


def test_a_full_temporary_folder_ends_the_job_and_is_no_fault_of_the_file(files, tmp_path, monkeypatch):
    mounted = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        with MediaPool(options(), 2) as pool, pytest.raises(ShardError, match=r"the temporary folder .* is full"):
            outcomes(pool, request(files["long"]), request(files["short"]))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
