"""One request to a server, http(s) or S3, and what came of it, in the same words for both.

Python's own http client and botocore and not fsspec: both give the bytes as they arrive, so that a stall, a cut and a
short answer are seen at once and counted by whoever asks; fsspec's file systems retry by themselves in places, hide
Retry-After and run an event loop on a thread, which does not survive a fork. botocore is what s3fs is built on, so
credentials, regions and endpoints come from the same variables and files.
"""

import datetime
import email.utils
import functools
import http.client
import os
import re
import socket
import ssl
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from alpro_stream.manifest.places import SCHEMES, scheme_of

_OK, _PARTIAL, _RANGE_REFUSED = 200, 206, 416
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN with temporary ones), or AWS_PROFILE"


class AttemptError(Exception):
    """A request that did not bring the bytes.

    Attributes:
        transient: whether the next one may.
        retry_after_s: seconds that the server wants us to wait before it; 0 where it says nothing.
    """

    def __init__(self, message: str, *, transient: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after_s = retry_after_s


class RangeRefusedError(AttemptError):
    """A server that holds fewer bytes than where the range starts."""


class Version(NamedTuple):
    """What tells one state of a file from another.

    Attributes:
        size: bytes of the whole file; None where the server does not say.
        etag: the server's mark of the contents, if any.
        modified: when it was last changed, in the server's words, if any.
    """

    size: int | None
    etag: str | None
    modified: str | None


class Answer(NamedTuple):
    """An answer whose bytes are still to be read.

    Attributes:
        first: position in the file of the first byte to be read: as asked for, or 0 of a server without ranges.
        version: of the file.
        read: gives at most so many bytes, as they arrive, and none at the end; raises `AttemptError`.
    """

    first: int
    version: Version
    read: Callable[[int], bytes]


def ask(
    address: str, first: int, end: int | None, *, timeout_s: float, s3_anonymous: bool
) -> AbstractContextManager[Answer]:
    """Asks for the bytes of a file from position `first` up to `end` (not included; None is all that follow).

    Args:
        address: ``http://``, ``https://`` or ``s3://bucket/key``.
        first: where to start.
        end: where to end.
        timeout_s: longest silence of the server.
        s3_anonymous: whether S3 is asked without credentials.

    Raises:
        AttemptError: no such address, or no answer that brings these bytes.
    """
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        raise AttemptError(
            f"cannot fetch {scheme}://; give a file or {', '.join(f'{name}://' for name in SCHEMES)}", transient=False
        )
    last = "" if end is None else end - 1
    byte_range = None if (first, end) == (0, None) else f"bytes={first}-{last}"
    if scheme == "s3":
        return _ask_s3(address, first, byte_range, timeout_s, s3_anonymous)
    return _ask_http(address, first, byte_range, timeout_s)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to other servers, but to no file and no other scheme."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https"):
            raise AttemptError(f"the server sends us to {scheme}://, which is not followed", transient=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    """Python's own opener reads files and FTP too; this one only speaks http."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def _ask_http(address: str, first: int, byte_range: str | None, timeout_s: float) -> Iterator[Answer]:
    headers = {"User-Agent": "alpro-stream"} | ({"Range": byte_range} if byte_range else {})
    with _http_errors(timeout_s):
        if not urlsplit(address).hostname:
            raise AttemptError("the address names no server; expected http://server/path", transient=False)
        # As browsers do: addresses with spaces or letters beyond ASCII are common in crawled data.
        request = urllib.request.Request(quote(address, safe="!#$%&'()*+,/:;=?@[]~"), headers=headers)
        answer = _opener().open(request, timeout=timeout_s)

    def read(size: int) -> bytes:
        with _http_errors(timeout_s):
            # Not `read`, which waits until there are so many, and loses what it has when the connection breaks.
            return bytes(answer.read1(size))

    with answer:
        yield _answer(answer.status, answer.headers, first, read)


@contextmanager
def _http_errors(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            advice = "; it wants a login, or the address has expired"
            raise _refused(error.code, str(error.reason), dict(error.headers.items()), advice) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _broken(error, timeout_s) from error


@contextmanager
def _ask_s3(address: str, first: int, byte_range: str | None, timeout_s: float, anonymous: bool) -> Iterator[Answer]:
    # A key is no path of a URL: it may hold "?", "#" and "%" that stand for themselves.
    bucket, _, key = address.partition("://")[2].partition("/")
    if not bucket or not key:
        raise AttemptError("the address names no object; expected s3://bucket/key", transient=False)
    with _s3_errors(bucket, timeout_s, anonymous):
        client = _s3_client(timeout_s, anonymous, os.getpid())
        answer = client.get_object(Bucket=bucket, Key=key, **({"Range": byte_range} if byte_range else {}))
    body, facts = answer["Body"], answer["ResponseMetadata"]

    def read(size: int) -> bytes:
        with _s3_errors(bucket, timeout_s, anonymous):
            return bytes(body.read(size))

    with closing(body):
        yield _answer(facts["HTTPStatusCode"], facts["HTTPHeaders"], first, read)


@functools.cache
def _s3_client(timeout_s: float, anonymous: bool, process: int) -> Any:
    """The client of a process; after a fork another one, because connections cannot be shared."""
    import botocore
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},  # attempts are counted by whoever asks
        response_checksum_validation="when_required",  # servers other than Amazon's do not all have them
        signature_version=botocore.UNSIGNED if anonymous else None,
    )
    return botocore.session.Session().create_client("s3", config=config)


@contextmanager
def _s3_errors(bucket: str, timeout_s: float, anonymous: bool) -> Iterator[None]:
    import botocore.exceptions as failures

    try:
        yield
    except failures.ClientError as error:
        said, facts = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
        code = str(said.get("Code", ""))
        status = int(facts.get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise AttemptError(f"missing: there is no bucket {bucket!r} (NoSuchBucket)", transient=False) from error
        if code in ("ExpiredToken", "InvalidToken"):  # answered with 400
            status = 403
        advice = f"; check {_CREDENTIALS}, and that they may read this object (a key that is missing looks the same)"
        if anonymous:
            advice = "; it is not public: set s3_anonymous=false to ask with credentials"
        words = "" if code == str(status) else f"{code}: {said.get('Message', '')}"  # no words, but the status again
        raise _refused(status, words, facts.get("HTTPHeaders", {}), advice) from error
    except (failures.NoCredentialsError, failures.PartialCredentialsError) as error:
        raise AttemptError(
            f"forbidden: no credentials for S3; set {_CREDENTIALS}, or s3_anonymous for a public bucket",
            transient=False,
        ) from error
    except failures.IncompleteReadError as error:
        raise AttemptError(f"cut short: {error}", transient=True) from error
    except (failures.BotoCoreError, OSError, ValueError) as error:
        raise _broken(error, timeout_s) from error


def _answer(status: int, headers: Mapping[str, str], first: int, read: Callable[[int], bytes]) -> Answer:
    """An answer by its headers.

    Raises:
        AttemptError: one that is neither the whole file nor the range that was asked for.
    """
    known = {name.lower(): value for name, value in headers.items()}
    etag, modified = known.get("etag"), known.get("last-modified")
    if status == _PARTIAL:
        given = known.get("content-range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
        if match is None or int(match[1]) != first:
            raise AttemptError(
                f"the server answers with the range {given!r}, expected one that starts at {first}", transient=False
            )
        return Answer(first, Version(None if match[2] == "*" else int(match[2]), etag, modified), read)
    if status != _OK:
        raise AttemptError(f"the server answers {status}, expected 200 or 206", transient=False)
    length = known.get("content-length", "")
    return Answer(0, Version(int(length) if length.isdecimal() else None, etag, modified), read)


def _refused(status: int, words: str, headers: Mapping[str, str], advice: str) -> AttemptError:
    """What an error answer means; `advice` says what to do about 401 and 403."""
    said = f"the server answers {status} {textwrap.shorten(words, 200)}".rstrip()
    wait_s = _retry_after_s(headers)
    if status == _RANGE_REFUSED:
        return RangeRefusedError(f"the file ends before the range that is wanted: {said}", transient=False)
    if status in (404, 410):
        return AttemptError(f"missing: {said}", transient=False)
    if status in (401, 403):
        return AttemptError(f"forbidden: {said}{advice}", transient=False)
    if status in (429, 503):
        return AttemptError(f"throttled: {said}; try fewer workers", transient=True, retry_after_s=wait_s)
    return AttemptError(said, transient=status in (408, 425) or status >= 500, retry_after_s=wait_s)


def _broken(error: Exception, timeout_s: float) -> AttemptError:
    """What it means that there is no answer, or no more of it."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return AttemptError(f"unreachable: its certificate is not valid: {cause.verify_message}", transient=False)
        if isinstance(cause, socket.gaierror):
            # A name that does not exist is as good as a missing file; name servers that do not answer are not.
            return AttemptError(
                f"unreachable: no such server: {cause.strerror}", transient=cause.errno == socket.EAI_AGAIN
            )
        if isinstance(cause, TimeoutError):
            return AttemptError(f"timed out: no byte for {timeout_s:g} s", transient=True)
        if isinstance(cause, ConnectionRefusedError):
            return AttemptError("unreachable: the connection was refused", transient=True)
    for cause in causes:
        if isinstance(cause, ConnectionError | http.client.IncompleteRead | ssl.SSLError):
            return AttemptError(f"cut short: {cause}", transient=True)
    if isinstance(causes[-1], OSError):
        return AttemptError(f"unreachable: {causes[-1].strerror or causes[-1]}", transient=True)
    return AttemptError(f"cannot be fetched: {textwrap.shorten(str(error), 200)}", transient=False)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those it was made from: urllib, urllib3 and botocore each keep them in a place of their own."""
    yield error
    kept = getattr(error, "kwargs", {}).get("error"), getattr(error, "reason", None), error.__cause__, *error.args
    for cause in kept:
        if isinstance(cause, BaseException):
            yield from _causes(cause)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that ``Retry-After`` asks for, given as a number or a date; 0 without it."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    if text.isdecimal():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, (email.utils.parsedate_to_datetime(text) - datetime.datetime.now(datetime.UTC)).total_seconds())
    return 0.0
