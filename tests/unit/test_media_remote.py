"""Fetching against real servers, http and S3, and a network between that fails in every way it can."""

import email.utils
import errno
import io
import os
import random
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from object_server import (
    CREDENTIALS,
    FaultProxy,
    FileServer,
    answer,
    cut,
    is_silent,
    reset,
    running,
    s3_server,
    silence,
    stall,
)

from alpro_stream.errors import FetchError, UnreadableError
from alpro_stream.media import is_address, request
from alpro_stream.media.remote import FetchConfig, pause_s
from alpro_stream.media.source import open_media

DATA = random.Random(0).randbytes(1_000_003)
NAME = "a clip? 100%#1.mp4"
FETCH = FetchConfig(backoff_s=0.001)
# Only for servers that fall silent: on a busy machine others are now and then as slow.
HASTY = FetchConfig(backoff_s=0.001, timeout_s=0.4)
# For those that fall silent once and must not seem to do it again.
PATIENT = FetchConfig(backoff_s=0.001, timeout_s=1.5)
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"


@pytest.fixture(scope="module")
def files():
    with running(FileServer({"/clip.mp4": DATA, "/empty.mp4": b"", "/spa%20ce%C3%A9.mp4": DATA[:9]})) as server:
        yield server


@pytest.fixture(scope="module")
def s3_port():
    with s3_server({"clips": {NAME: DATA, "empty": b""}, "open": {"a": DATA}}) as port:
        yield port


@pytest.fixture
def environment(monkeypatch):
    """Nothing of the machine's own AWS settings or proxies."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "http_proxy", "HTTP_PROXY", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    request._opener.cache_clear()
    return monkeypatch


@pytest.fixture(scope="module")
def proxies(files, s3_port):
    with running(FaultProxy(files.server_port)) as http, running(FaultProxy(s3_port)) as s3:
        yield {"http": http, "s3": s3}


@pytest.fixture
def s3_client(environment, proxies):
    """Clients are kept by process; those made before know another endpoint."""
    environment.setenv("AWS_ENDPOINT_URL", proxies["s3"].address)
    request._s3_client.cache_clear()
    yield proxies["s3"]
    request._s3_client.cache_clear()


@pytest.fixture(params=["http", "s3"])
def place(request, environment, proxies):
    """The address of `DATA` behind a proxy, of either kind, and the proxy."""
    proxy = proxies[request.param]
    environment.setenv("AWS_ENDPOINT_URL", proxies["s3"].address)
    proxy.faults, proxy.requests = [], []
    return f"{proxy.address}/clip.mp4" if request.param == "http" else f"s3://clips/{NAME}", proxy


def fetch(address, byte_range=None, config=FETCH):
    with open_media(address, byte_range=byte_range, fetch=config) as file:
        assert file.tell() == 0
        return file.read()


def failure(address, byte_range=None, config=FETCH):
    with pytest.raises(FetchError) as caught:
        fetch(address, byte_range, config)
    return caught.value


def test_what_is_an_address():
    assert is_address("s3://bucket/key")
    assert not is_address("/data/a.mp4")
    assert not is_address("C:/a.mp4")


def test_the_same_bytes_in_one_request(place):
    address, proxy = place
    assert fetch(address) == DATA
    assert len(proxy.requests) == 1


def test_a_range_is_asked_for_as_one(place):
    address, proxy = place
    assert fetch(address, (500_000, 300_001)) == DATA[500_000:800_001]
    assert fetch(address, (0, 1)) == DATA[:1]
    assert [wanted for _, wanted in proxy.requests] == ["bytes=500000-800000", "bytes=0-0"]


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([answer(503, SLOW_DOWN)], [None, None]),
        ([answer(500), answer(502), answer(504)], [None] * 4),
        ([answer(429, Retry_After="0")], [None, None]),
        ([reset(0)], [None, ""]),
        ([reset(600_000)], [None, ""]),
        ([cut(600_000)], [None, "bytes=600000-"]),
        ([cut(300_000), stall(200_000), reset(100_000), answer(503)], [None, "bytes=300000-", "", "", ""]),
        ([stall(0)], [None, None]),
        ([stall(600_000)], [None, "bytes=600000-"]),
        ([silence(9)], [None, None]),
        ([silence(0.1)], [None]),
    ],
    ids=[
        "slow-down",
        "5xx",
        "429",
        "reset",
        "reset-midway",
        "cut",
        "several",
        "stall",
        "stall-midway",
        "late",
        "a-bit-late",
    ],
)
def test_a_bad_network_costs_requests_and_no_bytes(place, faults, ranges):
    address, proxy = place
    proxy.faults = list(faults)
    assert fetch(address, config=PATIENT if any(map(is_silent, faults)) else FETCH) == DATA
    assert len(proxy.requests) == len(ranges)
    for (_, asked), expected in zip(proxy.requests, ranges, strict=True):
        if expected != "" and not (address.startswith("s3") and expected is not None):
            assert asked == expected  # botocore gives what arrived in whole pieces only, so S3 goes on from earlier


def test_a_range_goes_on_where_it_was_cut(place):
    address, proxy = place
    proxy.faults = [cut(300_000)]
    assert fetch(address, (1_000, 900_000)) == DATA[1_000:901_000]
    first, last = proxy.requests[1][1].removeprefix("bytes=").split("-")
    assert int(first) > 200_000
    assert last == "900999"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (answer(503, SLOW_DOWN), "throttled: the server answers 503"),
        (answer(429), "throttled: the server answers 429"),
        (answer(500), "the server answers 500"),
        (cut(1000), "cut short: .*expected"),
        (stall(1000), r"timed out: no byte for 0.4 s"),
        (silence(9), r"timed out: no byte for 0.4 s"),
        (reset(0), "cut short"),
    ],
)
def test_attempts_are_bounded(place, fault, words):
    address, proxy = place
    proxy.faults = [fault] * 9
    config = HASTY if is_silent(fault) else FETCH
    error = failure(address, config=config.model_copy(update={"attempts": 2}))
    assert error.transient
    with pytest.raises(FetchError, match=f"{words}.*last of 2 attempts"):
        raise error
    assert len(proxy.requests) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (answer(403, DENIED), "forbidden: .*403"),
        (answer(401, DENIED), "forbidden: .*401"),
        (answer(404), "missing: .*404"),
        (answer(410), "missing: .*410"),
        (answer(400), "the server answers 400"),
        (answer(204), "answers 204, expected 200"),
    ],
)
def test_what_will_not_change_is_asked_once(place, fault, words):
    address, proxy = place
    proxy.faults = [fault]
    error = failure(address)
    with pytest.raises(FetchError, match=words):
        raise error
    assert not error.transient
    assert "attempts" not in str(error)
    assert len(proxy.requests) == 1


def test_missing_files_and_objects(place):
    address, proxy = place
    if not address.startswith("s3"):
        assert str(failure(f"{proxy.address}/none.mp4")) == "missing: the server answers 404 Not Found"
        return
    assert "missing: the server answers 404 NoSuchKey" in str(failure("s3://clips/none"))
    assert "missing: there is no bucket 'none'" in str(failure("s3://none/none"))
    for bad in ("s3://", "s3://clips", "s3://clips/", "s3:///key"):
        assert "expected s3://bucket/key" in str(failure(bad))


def test_s3_says_which_credentials_to_set(s3_client, environment):
    s3_client.faults = [answer(403, DENIED), answer(400, EXPIRED)]
    assert "403 AccessDenied: Access Denied; check AWS_ACCESS_KEY_ID" in str(failure(f"s3://clips/{NAME}"))
    assert "forbidden: the server answers 403 ExpiredToken" in str(failure(f"s3://clips/{NAME}"))
    request._s3_client.cache_clear()
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    s3_client.requests = []
    assert "no credentials for S3; set AWS_ACCESS_KEY_ID" in str(failure("s3://open/a"))
    assert s3_client.requests == []
    anonymous = FetchConfig(s3_anonymous=True)
    assert fetch("s3://open/a", config=anonymous) == DATA
    assert "it is not public" in str(failure(f"s3://clips/{NAME}", config=anonymous))


def test_one_client_a_process(s3_client):
    for _ in range(3):
        assert fetch(f"s3://clips/{NAME}") == DATA
    assert request._s3_client.cache_info().misses == 1


def test_empty_and_too_large(place):
    address, proxy = place
    empty = "s3://clips/empty" if address.startswith("s3") else f"{proxy.address}/empty.mp4"
    with pytest.raises(UnreadableError, match="the file is empty"):
        fetch(empty)
    error = failure(address, config=FetchConfig(max_bytes=500_000))
    assert "too large: 1000003 bytes" in str(error)  # as stated, before any byte is read
    assert not error.transient
    small = FetchConfig(max_bytes=1_000_002)
    assert fetch(address, (1, 1_000_002), small) == DATA[1:]
    asked = len(proxy.requests)
    assert "too large" in str(failure(address, (0, 2_000_000), small))
    assert len(proxy.requests) == asked


def test_ranges_beyond_the_end(place):
    address, proxy = place
    assert "expected in a file that holds 1000003" in str(failure(address, (1_000_000, 4)))
    assert "ends before the range" in str(failure(address, (1_000_003, 1)))
    assert len(proxy.requests) == 2


def test_a_file_that_changes_is_fetched_anew(environment):
    other = DATA[::-1][:-1]
    with running(FileServer({"/a": DATA})) as server, running(FaultProxy(server.server_port)) as proxy:

        def changing(handler):
            cut(600_000)(handler)
            server.files["/a"] = other

        proxy.faults = [changing]
        assert fetch(f"{proxy.address}/a") == other
        assert [wanted for _, wanted in proxy.requests] == [None, "bytes=600000-", None]
        server.files["/a"], proxy.faults, proxy.requests = DATA, [changing], []
        other = DATA[:10]  # ends before the rest begins
        assert fetch(f"{proxy.address}/a") == other
        other = bytes(len(DATA))  # as long as before
        for server.ranges in (True, False):
            server.files["/a"], proxy.faults, proxy.requests = DATA, [changing], []
            assert fetch(f"{proxy.address}/a") == other


@pytest.mark.parametrize("length", ["stated", "chunked", "unknown"])
def test_servers_without_ranges_or_lengths(environment, length):
    with running(FileServer({"/a": DATA})) as server:
        server.ranges, server.length = False, length
        assert fetch(f"{server.address}/a") == DATA
        assert fetch(f"{server.address}/a", (700_000, 250_000)) == DATA[700_000:950_000]
        assert len(server.requests) == 2
        assert "too large" in str(failure(f"{server.address}/a", config=FetchConfig(max_bytes=900_000)))
        with running(FaultProxy(server.server_port)) as proxy:
            proxy.faults = [cut(600_000)] if length == "stated" else []
            assert fetch(f"{proxy.address}/a") == DATA
            assert fetch(f"{proxy.address}/a", (700_000, 250_000)) == DATA[700_000:950_000]


def test_a_chunked_answer_that_is_cut_is_fetched_anew(environment):
    with running(FileServer({"/a": DATA})) as server:
        server.length = "chunked"
        with running(FaultProxy(server.server_port)) as proxy:
            whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"%x\r\n" % len(DATA) + DATA[:70_000]
            proxy.faults = [lambda handler: handler.wfile.write(whole)]
            assert fetch(f"{proxy.address}/a") == DATA
            assert [wanted for _, wanted in proxy.requests] == [None, None]


def test_a_wrong_range_is_refused(environment, files):
    with running(FaultProxy(files.server_port)) as proxy:
        for given in ("bytes 5-9/100", "bytes */100", "10-19"):
            proxy.faults = [answer(206, b"0123456789", Content_Range=given)]
            assert "expected one that starts at 10" in str(failure(f"{proxy.address}/clip.mp4", (10, 10)))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "s3://clips/a", "data:,abc"])
def test_redirects_stay_with_http(environment, files, target):
    files.redirects = {"/away": target, "/on": "/clip.mp4", "/round": "/round"}
    error = failure(f"{files.address}/away")
    assert "the server sends us to" in str(error) or "is not allowed" in str(error)
    assert not error.transient
    assert fetch(f"{files.address}/on", (5, 5)) == DATA[5:10]
    assert "302" in str(failure(f"{files.address}/round"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("file:///etc/passwd", "cannot fetch file://; give a file or http://, https://, s3://"),
        ("ftp://127.0.0.1/a", "cannot fetch ftp://"),
        ("filecache::http://127.0.0.1/a", "cannot fetch filecache::http://"),
        ("http:///a", "names no server"),
        ("http://[::1/a", "cannot be fetched: Invalid IPv6"),
        ("http://127.0.0.1:port/a", "cannot be fetched"),
        ("http://127.0.0.1:1/a\r\nHost: b", None),
    ],
)
def test_what_is_no_address(environment, address, words):
    error = failure(address, config=FetchConfig(attempts=1))
    assert words is None or words in str(error)
    assert words is None or not error.transient


def test_addresses_as_people_write_them(environment, files):
    assert fetch(f"{files.address}/spa ceé.mp4") == DATA[:9]
    assert fetch(f"{files.address.upper()}/spa%20ce%C3%A9.mp4".replace("HTTP", "HTTP")) == DATA[:9]


def test_unreachable_servers(s3_client, environment):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        error = failure(f"{closed}/a", config=FetchConfig(attempts=2, backoff_s=0))
        assert str(error) == "unreachable: the connection was refused (at the last of 2 attempts)"
        assert error.transient
        environment.setenv("AWS_ENDPOINT_URL", closed)
        assert "unreachable: the connection was refused" in str(failure("s3://a/b", config=FetchConfig(backoff_s=0)))


def test_names_that_do_not_exist(s3_client, environment):
    def find(code):
        def getaddrinfo(*_, **__):
            raise socket.gaierror(code, "Name or service not known")

        return getaddrinfo

    environment.setenv("AWS_ENDPOINT_URL", "http://no-such-server.invalid")
    for address in ("http://no-such-server.invalid/a", "s3://a/b"):
        for code, transient in ((socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)):
            # The resolver is replaced: not every machine that runs tests has one.
            environment.setattr(socket, "getaddrinfo", find(code))
            error = failure(address, config=FetchConfig(attempts=2, backoff_s=0))
            assert "unreachable: no such server" in str(error)
            assert error.transient == transient


def test_a_full_disk_is_said_and_not_asked_again(environment, files, s3_client):
    files.requests.clear()
    s3_client.faults, s3_client.requests = [], []

    class Disk(io.FileIO):
        def truncate(self, size=None):
            return 0  # which devices cannot do

    # The one file that any machine finds full; with a buffer where one is asked for, as of a temporary file.
    def full(buffering=-1):
        return Disk("/dev/full", "r+") if buffering == 0 else io.BufferedRandom(Disk("/dev/full", "r+"))

    environment.setattr(tempfile, "TemporaryFile", full)
    # Nine bytes too, which a buffer would keep until the file is read or closed.
    for address in (f"{files.address}/clip.mp4", f"{files.address}/spa ceé.mp4", f"s3://clips/{NAME}"):
        with pytest.raises(OSError, match="No space left on device") as caught:
            fetch(address)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, tempfile.gettempdir())
    assert (len(files.requests), len(s3_client.requests)) == (2, 1)


def test_a_disk_that_refuses_otherwise_costs_its_row_alone(files):
    """A limit on the size of files, say, is met by the large ones only."""
    script = (
        "import resource, signal, sys\n"
        "from alpro_stream.errors import FetchError\n"
        "from alpro_stream.media.source import open_media\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n"
        "    with open_media(sys.argv[1]): pass\n"
        "except FetchError as error:\n"
        "    print(error.transient, error)\n"
    )
    command = [sys.executable, "-c", script, f"{files.address}/clip.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True the temporary file cannot be written: File too large\n"


def test_pauses():
    assert [pause_s(n, 0.0, 0.5, 0.999999) for n in (1, 2, 3)] == pytest.approx([0.5, 1, 2], rel=1e-4)
    assert pause_s(1, 0.0, 0.5, 0.0) == 0.0
    assert pause_s(40, 0.0, 0.5, 0.999999) == pytest.approx(30, rel=1e-4)
    assert pause_s(1, 7.0, 0.5, 0.0) == 7.0
    assert pause_s(1, 3600.0, 0.5, 0.0) == 30.0


def test_the_server_says_when_to_come_back(place):
    address, proxy = place
    proxy.faults = [answer(429, Retry_After="1")]
    started = time.monotonic()
    assert fetch(address) == DATA
    assert 1.0 <= time.monotonic() - started < 6.0


def test_retry_after_is_a_number_or_a_date():
    assert request._retry_after_s({"retry-after": "12"}) == 12.0
    soon = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert request._retry_after_s({"Retry-After": soon}) == pytest.approx(20, abs=2)
    assert request._retry_after_s({"Retry-After": "soon"}) == request._retry_after_s({}) == 0.0
    assert request._retry_after_s({"Retry-After": email.utils.formatdate(0, usegmt=True)}) == 0.0


def test_memory_does_not_grow_with_the_file(environment):
    """In a process of its own: the peak of this one is of other tests."""
    script = (
        "import sys\n"
        "from alpro_stream.media.source import open_media\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "def peak(): return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]) >> 10\n"
        "for name in 'small', 'large':\n"
        "    with open_media(f'{sys.argv[1]}/{name}') as file: pass\n"
        "    print(peak())\n"
    )
    with running(FileServer({"/small": DATA, "/large": bytes(150 << 20)})) as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.address], capture_output=True, text=True, check=True, timeout=60
        )
    small, large = map(int, done.stdout.split())
    assert large - small < 40


def test_a_client_of_its_own_after_a_fork(s3_client):
    assert fetch(f"s3://clips/{NAME}") == DATA
    child = os.fork()
    if child == 0:
        os._exit(0 if fetch(f"s3://clips/{NAME}") == DATA and request._s3_client.cache_info().misses == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert fetch(f"s3://clips/{NAME}") == DATA
