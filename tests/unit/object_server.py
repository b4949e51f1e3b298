"""Real servers for tests: files over http, S3 (moto's), and a proxy in front of either that does what networks do.

And a look into the cache of what they serve.
"""

import fcntl
import hashlib
import http.client
import http.server
import os
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


class FileServer(_Server):
    """Serves `files` (path to bytes) with ETags.

    Attributes:
        ranges: whether it knows ranges.
        length: how it says where a body ends: "stated", "chunked", or "unknown" until the connection ends.
        redirects: paths to the places they lead to.
        requests: path and Range header of every request.
    """

    def __init__(self, files):
        super().__init__(_FileHandler)
        self.files, self.ranges, self.length = dict(files), True, "stated"
        self.redirects, self.requests = {}, []


class _FileHandler(_Handler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.requests.append((self.path, wanted))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in server.files:
            self.send_error(404)
            return
        body, status, given = server.files[self.path], 200, None
        whole = len(body)
        if wanted and server.ranges:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            if int(first) >= whole:
                self.send_error(416)
                return
            until = min(int(last) + 1 if last else whole, whole)
            given, status = f"bytes {first}-{until - 1}/{whole}", 206
            etag, body = self._etag(body), body[int(first) : until]
        else:
            etag = self._etag(body)
        self.send_response(status)
        self.send_header("ETag", etag)
        if given:
            self.send_header("Content-Range", given)
        self.send_header("Connection", "close")
        if server.length == "stated":
            self.send_header("Content-Length", str(len(body)))
        if server.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in _pieces(body, 65536)) + b"0\r\n\r\n"
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    @staticmethod
    def _etag(body):
        return f'"{hashlib.md5(body).hexdigest()}"'


def _pieces(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


class FaultProxy(_Server):
    """Hands requests to the server at another port; each of `faults` is done to one request, in order.

    Attributes:
        requests: path and Range header of every request.
    """

    def __init__(self, port):
        super().__init__(_ProxyHandler)
        self.port, self.faults, self.requests = port, [], []
        self.released = threading.Event()


class _ProxyHandler(_Handler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"]))
        fault = server.faults.pop(0) if server.faults else _pass_on
        self.close_connection = True
        fault(self)

    def ask(self):
        """The answer of the server behind: status line and headers as bytes, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        try:
            connection.request("GET", self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
            kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")]
            head = [f"HTTP/1.1 {answer.status} {answer.reason}", "Connection: close", *(f"{n}: {v}" for n, v in kept)]
            return "\r\n".join([*head, "", ""]).encode("latin-1"), body
        finally:
            connection.close()


def _pass_on(handler):
    head, body = handler.ask()
    handler.wfile.write(head + body)


def answer(status, body=b"", **headers):
    """The proxy answers by itself."""

    def fault(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return fault


def cut(num_bytes):
    """The connection ends in good order after so many bytes of the body, fewer than its headers state."""

    def fault(handler):
        head, body = handler.ask()
        handler.wfile.write(head + body[:num_bytes])

    return fault


def reset(num_bytes):
    """The connection breaks after so many bytes of the body."""

    def fault(handler):
        head, body = handler.ask()
        handler.wfile.write(head + body[:num_bytes])
        time.sleep(0.05)  # a reset overtakes bytes that are still on their way
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    return fault


def stall(num_bytes):
    """Nothing comes after so many bytes of the body, and the connection stays open."""

    def fault(handler):
        head, body = handler.ask()
        handler.wfile.write(head + body[:num_bytes])
        handler.server.released.wait(30)

    fault.silent = True
    return fault


def silence(seconds):
    """The answer is late."""

    def fault(handler):
        head, body = handler.ask()
        handler.server.released.wait(seconds)
        handler.wfile.write(head + body)

    fault.silent = seconds >= 1
    return fault


def is_silent(fault):
    """Whether it takes a client of little patience to notice the fault."""
    return getattr(fault, "silent", False)


@contextmanager
def running(server):
    """Runs a `FileServer` or a `FaultProxy`."""
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        if isinstance(server, FaultProxy):
            server.released.set()
        server.shutdown()
        server.server_close()


@contextmanager
def s3_server(objects):
    """Runs moto's S3 with `objects` (bucket to key to bytes; those of the bucket "open" are public); gives its port."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        for bucket, contents in objects.items():
            client.create_bucket(Bucket=bucket)
            for key, data in contents.items():
                readers = "public-read" if bucket == "open" else "private"
                client.put_object(Bucket=bucket, Key=key, Body=data, ACL=readers)
        yield port
    finally:
        moto.stop()


def num_bytes_in(folder, *kinds):
    """Of a shard cache's folder: what its "files" or "partial" hold, while nobody changes them."""
    with (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for kind in kinds for path in (folder / kind).iterdir())
