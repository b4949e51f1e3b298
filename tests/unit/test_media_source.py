"""Opening files, parts of files and addresses: one way for all, and nothing left behind."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from object_server import FaultProxy, FileServer, running, stall
from open_files import open_files
from PIL import Image

from alpro_stream.errors import FetchError, UnreadableError
from alpro_stream.media.source import digest_of, open_media, open_regular_file, window_of

CLIP = sorted(Path("examples/clips/videos").iterdir())[0]
DATA = random.Random(1).randbytes(300_001)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    return tmp_path / "data"


@pytest.fixture
def server():
    with running(FileServer({"/data": DATA, "/clip.mp4": CLIP.read_bytes(), "/empty": b""})) as started:
        yield started


@pytest.fixture
def places(path, server, tmp_path):
    """The same bytes: a file, a part of a file, an address, and a part of what is behind one."""
    server.files["/tar"] = b"before" + DATA + b"after"
    (tmp_path / "tar").write_bytes(b"before" + DATA + b"after")
    part = (6, len(DATA))
    whole = [(str(path), None), (path, None), (f"{server.address}/data", None)]
    return [*whole, (tmp_path / "tar", part), (f"{server.address}/tar", part)]


def test_every_place_gives_a_file_that_reads_and_seeks_alike(places):
    draw = random.Random(2)
    for place, part in places:
        reference = io.BytesIO(DATA)
        with open_media(place, byte_range=part) as file:
            assert file.seekable()
            assert file.readable()
            for _ in range(300):
                where, whence = draw.choice([(draw.randrange(len(DATA)), 0), (-draw.randrange(len(DATA)), 2), (0, 1)])
                assert file.seek(where, whence) == reference.seek(where, whence)
                size = draw.choice([0, 1, 100, 70_000, -1])
                assert file.read(size) == reference.read(size)
                assert file.tell() == reference.tell()
            assert file.seek(len(DATA) + 5) == len(DATA) + 5
            assert file.read(10) == b""
            file.seek(0)
            assert b"".join(iter(lambda: file.read(65_536), b"")) == DATA
        assert file.closed


def test_digests(places):
    for place, part in places:
        with open_media(place, byte_range=part) as file:
            file.seek(17)
            assert digest_of(file) == hashlib.sha256(DATA).hexdigest()
            assert file.tell() == 17
            assert file.read(3) == DATA[17:20]


def test_videos_and_images_are_decoded_from_every_place(tmp_path, server):
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(picture)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(picture, "a.png")
        tar.add(CLIP, "a.mp4")
    with tarfile.open(tmp_path / "a.tar") as tar:
        parts = {member.name: (member.offset_data, member.size) for member in tar}
    server.files["/a.tar"] = (tmp_path / "a.tar").read_bytes()

    def frames(place, part=None):
        with open_media(place, byte_range=part) as file, av.open(file) as container:
            return [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), 9)]

    expected = frames(CLIP)
    assert len(expected) == 9
    for place in (tmp_path / "a.tar", f"{server.address}/a.tar"):
        np.testing.assert_array_equal(frames(place, parts["a.mp4"]), expected)
        with open_media(place, byte_range=parts["a.png"]) as file, Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(picture)))


def test_windows_do_not_move_each_other(path):
    with path.open("rb") as file:
        first, second = window_of(file.fileno(), 0, 10), window_of(file.fileno(), 5, 10)
        assert first.read(4) == DATA[:4]
        assert second.read(4) == DATA[5:9]
        assert first.read() == DATA[4:10]
        with pytest.raises(io.UnsupportedOperation):
            first.write(b"a")
        with pytest.raises(ValueError, match="before the start"):
            first.raw.seek(-1)


@pytest.mark.parametrize("part", [(300_000, 2), (300_001, 1), (-1, 5), (0, 0), (5, -1), (1 << 70, 1)])
def test_windows_beyond_the_file_are_refused(path, part):
    with pytest.raises(UnreadableError, match="in a file that holds 300001"), open_media(path, byte_range=part):
        pass


def test_what_is_no_file_with_contents_is_refused_at_once(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "missing": "No such file",
        "empty": "is empty",
        "pipe": "not a regular file",
        "loop": "symbolic links",
        ".": "not a regular file",
        "a\0b": "null byte",
        "/dev/zero": "not a regular file",
    }
    before = open_files()
    for name, words in cases.items():
        with pytest.raises(UnreadableError, match=words), open_media(tmp_path / name):
            pass
    assert not open_files() - before


def test_addresses_that_are_empty_or_of_another_scheme(server):
    with pytest.raises(UnreadableError, match="is empty"), open_media(f"{server.address}/empty"):
        pass
    with pytest.raises(FetchError, match="cannot fetch file://"), open_media("file:///etc/passwd"):
        pass
    # A path that only looks like an address once slashes are merged stays a path.
    with pytest.raises(UnreadableError, match="No such file"), open_media(Path("file:///etc/passwd")):
        pass


def test_nothing_stays_of_a_fetch_that_is_killed(server, tmp_path):
    script = "import sys\nfrom alpro_stream.media.source import open_media\nwith open_media(sys.argv[1]): pass\n"
    with running(FaultProxy(server.server_port)) as proxy:
        proxy.faults = [stall(200_000)]
        command = [sys.executable, "-c", script, f"{proxy.address}/data"]
        child = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
        deadline = time.monotonic() + 30
        while not proxy.requests and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_several_at_once(places):
    found = []

    def read():
        for place, part in places:
            with open_media(place, byte_range=part) as file:
                found.append(file.read() == DATA)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 * len(places)


def test_a_regular_file_is_read_only(path):
    with open_regular_file(path) as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"a")
