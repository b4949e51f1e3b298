"""The served search: a real process, real sockets, a real browser; and what may not be asked for."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from page_files import Page
from PIL import Image
from search_files import NUM_CLIPS, embed, make_root

from alpro_launch.cli import main as alpro
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.manifest import QA
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample, SampleMetadata
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.testing.shards import COLOURS, picture

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NUM_ALL = NUM_CLIPS + 1


class Server:
    """`alpro search --serve` in a process, and requests to it exactly as they are written."""

    def __init__(self, root: Path, *options: str) -> None:
        command = [sys.executable, "-m", "alpro_launch.cli", "search", "--serve", "--port", "0"]
        command += ["--index", str(root / "index"), "--model", str(root / "model"), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        watchdog.cancel()
        found = re.search(r"(\d+) clips at http://127\.0\.0\.1:(\d+)/", first)
        assert found, first
        self.num_clips, self.port = int(found[1]), int(found[2])

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), body

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = make_root(tmp_path_factory.mktemp("served"))
    (root / "corpus/more").mkdir()
    metadata = SampleMetadata(
        key="hostile",
        id="hostile",
        captions=(HOSTILE,),
        qa=(QA("q", "a"),),
        kind="video",
        frame_timestamps_s=(0.0, 1.5),
        source={"media": "../../" + HOSTILE},
    )
    with ShardWriter(root / "corpus/more", "video-000000", "video") as writer:
        writer.add(Sample(metadata, (picture(0, 0, 64), picture(1, 0, 64))))
        infos = [writer.close()]
    save_dataset_info(root / "corpus/more", DatasetInfo.of_shards("more", {"payload": "frames"}, infos))
    shutil.rmtree(root / "index")
    embed(root, sources=[{"path": root / "corpus/train"}, {"path": root / "corpus/more", "name": HOSTILE}])
    return root


@pytest.fixture(scope="module")
def server(root):
    server = Server(root, "--top", str(NUM_ALL), "--rerank", "3")
    yield server
    status, out, err = server.stop()
    assert (status, out, err) == (0, "stopped\n", ""), "Ctrl-C ends it, with no traceback of any request"


def test_a_query_gives_hits_with_frames_that_are_there(server):
    assert server.num_clips == NUM_ALL
    status, headers, body = server.get("/api/search?q=a+red+dog&top=3")
    found = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert (found["query"], found["num_clips"]) == ("a red dog", NUM_ALL)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    matches = [hit["match"] for hit in found["hits"]]
    assert matches == sorted(matches, reverse=True)
    for hit in found["hits"]:
        assert hit["frames"]
        for frame in hit["frames"]:
            status, headers, jpeg = server.get(frame["address"])
            assert (status, headers["Content-Type"]) == (200, "image/jpeg")
            assert Image.open(io.BytesIO(jpeg)).size == (256, 256)


def test_the_page_has_a_box_and_after_a_query_the_clips(server):
    assert Page(server.get("/")[2].decode()).all("input", name="q")
    page = Page(server.get("/?q=a+red+dog")[2].decode())
    assert page.all("input")[0]["value"] == "a red dog"
    assert len(page.all("li")) == NUM_ALL
    assert all(re.fullmatch(r"/clip/\d+/\d+\.jpg", image["src"]) for image in page.all("img"))


def test_every_answer_allows_nothing_but_itself(server):
    for path in ("/", "/?q=dog", "/api/search?q=dog", "/clip/0/0.jpg", "/nowhere", "/clip/0/99.jpg"):
        _, headers, _ = server.get(path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';"), path
        assert "script-src" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
        assert headers["Cache-Control"] == "no-store", "another index on this port has other clips there"


@pytest.mark.parametrize(
    "path",
    [
        "/clip/../../../../etc/passwd",
        "/clip/0/../../../etc/passwd",
        "/clip/%2e%2e/%2e%2e/etc/passwd",
        "/clip/..%2f..%2fetc%2fpasswd/0.jpg",
        "/clip/0/..%2f0.jpg",
        "/clip/0/0.jpg%00.txt",
        "/clip/0/0.jpg/..",
        "/clip/-1/0.jpg",
        f"/clip/{NUM_ALL}/0.jpg",
        "/clip/999999999999/0.jpg",
        "/clip/9999999999999999999999/0.jpg",
        "/clip/0/999.jpg",
        "/clip/%D9%A1/0.jpg",  # an Arabic digit
        "/clip/0x1/0.jpg",
        "/clip/video-00000/0.jpg",
        "/clip/0/0.png",
        "/etc/passwd",
        "//etc/passwd",
        "/index.json",
        "/parts/00000.npy",
        "/api/../index.json",
        "/static/..%5c..%5cindex.json",
    ],
)
def test_what_lies_outside_cannot_be_asked_for(server, path):
    status, headers, body = server.get(path)
    assert status in (400, 404), path
    assert b"root:" not in body
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/search", "the query is empty"),
        ("/api/search?q=%20", "the query is empty"),
        ("/api/search?q=" + "x" * 1001, "has 1001 characters; at most 1000"),
        ("/api/search?q=dog&top=0", "expected a number from 1 to 100"),
        ("/api/search?q=dog&top=-1", "expected a number from 1 to 100"),
        ("/api/search?q=dog&top=101", "expected a number from 1 to 100"),
        ("/api/search?q=dog&top=1e9", "expected a number from 1 to 100"),
        ("/api/search?q=dog&top=", "expected a number from 1 to 100"),
    ],
)
def test_questions_that_cannot_be_answered(server, path, message):
    status, _, body = server.get(path)
    assert status == 400
    assert message in json.loads(body)["error"]


def test_a_page_for_a_query_that_cannot_be_answered_says_why(server):
    status, _, body = server.get("/?q=" + "%3Cb%3E" * 400)
    assert status == 400
    assert Page(body.decode()).all("p", role="alert")
    assert "1200 characters" in body.decode()
    assert server.get("/?q=%ff%00%f0%9f%90%88+the+of")[0] == 200
    assert server.get("/?q=" + "x" * 10_000)[0] == 400
    assert server.get("/api/search?q=still+there")[0] == 200


def test_a_page_of_another_site_cannot_use_it_under_its_own_name(server):
    assert server.get("/api/search?q=dog", Host="evil.example")[0] == 403
    assert server.get("/", Host=f"evil.example:{server.port}")[0] == 403
    assert server.get("/", Host=f"localhost:{server.port}")[0] == 200
    assert server.get("/", Host=f"[::1]:{server.port}")[0] == 200


def test_captions_queries_and_names_are_escaped(server):
    hits = json.loads(server.get(f"/api/search?q=dog&top={NUM_ALL}")[2])["hits"]
    assert [hit["source"] for hit in hits if hit["captions"] == [HOSTILE]] == [HOSTILE]
    page = Page(server.get("/?q=%3Cscript%3Ealert(1)%3C%2Fscript%3E")[2].decode())
    assert HOSTILE in page.text
    assert "<script>alert(1)</script>" in page.text
    assert not page.all("script")
    assert not page.all("img", src="x")


def browser(folder: Path, *options: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command.append(f"--user-data-dir={folder / 'profile'}")
    return subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120).stdout


def assert_pictures_are_seen(folder: Path, address: str) -> None:
    """Looks at the screen: what a policy blocks, or what is no picture, is in the document all the same.

    A browser on a busy machine may be looked at before it has decoded every clip: it is looked at again, for longer.
    """
    shot = folder / "shot.png"
    for budget_ms in (5_000, 20_000, 60_000):
        options = [f"--screenshot={shot}", "--window-size=1200,3600", f"--virtual-time-budget={budget_ms}"]
        browser(folder, *options, address)
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        seen = {
            name: int((np.abs(pixels - np.array(colour)).max(axis=2) < 30).sum()) for name, colour in COLOURS.items()
        }
        if min(seen.values()) > 20_000:
            return
    raise AssertionError(f"pictures are not there; pixels of each colour: {seen}")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as `apt-get install chromium` brings it")
def test_a_real_browser_shows_the_clips_and_runs_nothing(server, tmp_path):
    address = f"http://127.0.0.1:{server.port}/?q=a+red+dog"
    page = Page(browser(tmp_path, "--dump-dom", address))
    assert len(page.all("li")) == NUM_ALL
    assert "owned" not in "".join(page.text).replace(HOSTILE, ""), "what the hostile caption would have changed"
    assert not page.all("img", src="x")
    assert_pictures_are_seen(tmp_path, address)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as `apt-get install chromium` brings it")
def test_a_real_browser_shows_the_page_as_a_file(root, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["search", "a red dog", "--page", str(page), "--top", str(NUM_ALL)]
    assert alpro([*arguments, "--index", str(root / "index"), "--model", str(root / "model")]) == 0
    assert_pictures_are_seen(tmp_path, page.as_uri())
    films = tmp_path / "films.html"
    films.write_text(page.read_text().replace(" poster=", " data-poster=").replace("<img ", "<x-img "))
    assert_pictures_are_seen(tmp_path, films.as_uri())


def test_an_index_that_is_removed_meanwhile_is_told_as_everything_else(root, tmp_path):
    for name in ("corpus", "model", "index"):
        shutil.copytree(root / name, tmp_path / name)
    server = Server(tmp_path)
    shutil.rmtree(tmp_path / "index")
    status, headers, body = server.get("/api/search?q=dog")
    assert (status, headers["Content-Type"]) == (500, "application/json; charset=utf-8")
    assert "was removed or changed since the index was opened" in json.loads(body)["error"]
    status, _, body = server.get("/clip/0/0.jpg")
    assert status == 404
    assert b"was removed or changed" in body
    status, _, body = server.get("/?q=dog")
    assert status == 500
    assert Page(body.decode()).all("p", role="alert")
    assert server.stop() == (0, "stopped\n", ""), "no traceback"


def serve(root, *options):
    return alpro(["search", "--serve", "--index", str(root / "index"), "--model", str(root / "model"), *options])


def test_a_port_that_is_taken_is_told_at_once(root, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve(root, "--port", str(taken.getsockname()[1])) == CONFIGURATION
    shown = capsys.readouterr().err
    assert "is taken by another program; give another one by --port" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen at 192.0.2.1"),
        (["--host", "no such host", "--port", "0"], "cannot listen at no such host"),
        (["--page", "x.html"], "--serve takes no query and no --page"),
    ],
)
def test_where_it_cannot_be_served(root, options, message, capsys):
    assert serve(root, *options) == CONFIGURATION
    assert message in capsys.readouterr().err


def test_an_index_that_cannot_be_opened_ends_it(root, tmp_path, capsys):
    assert serve(root, "--port", "0", "--index", str(tmp_path)) != 0
    assert f"{tmp_path} is no index" in capsys.readouterr().err


def test_other_hosts_are_warned_about_and_sigterm_ends_it(root):
    command = [sys.executable, "-m", "alpro_launch.cli", "search", "--serve", "--host", "0.0.0.0", "--port", "0"]
    command += ["--index", str(root / "index"), "--model", str(root / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "warning: whoever can reach 0.0.0.0" in process.stderr.readline()
        port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/", headers={"Host": "media.example"})
        assert connection.getresponse().status == 200, "its own name is not known here"
        process.terminate()
        assert process.communicate(timeout=60)[0] == "stopped\n"
        assert process.returncode == 0
