"""Media by address: fetched whole, or a range of them, with as many attempts as it takes and no more."""

import errno
import random
import tempfile
import time
from typing import BinaryIO

from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import FetchError
from alpro_stream.media.request import Answer, AttemptError, RangeRefusedError, Version, ask

_CHUNK_BYTES = 1 << 18
_LONGEST_PAUSE_S = 30.0
# Of its own, so that fetching does not move the random numbers of whoever uses Python's.
_JITTER = random.Random()


class FetchConfig(Config):
    """How media behind addresses are fetched.

    Credentials and the endpoint of S3 are those of every AWS program: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_PROFILE, AWS_ENDPOINT_URL and so on; proxies are taken from HTTP_PROXY and HTTPS_PROXY.
    """

    timeout_s: float = Field(default=30.0, gt=0)
    """Longest silence of the server."""
    attempts: int = Field(default=5, ge=1)
    """Most requests for one file, the first included; those after it go on where the last one was cut."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Longest pause before the second attempt, doubled for each one after it, up to 30 s; the pause is drawn at random
    up to it, so that workers do not come back together, and is added to what the server asks for (Retry-After)."""
    max_bytes: int = Field(default=8 << 30, gt=0)
    """Largest file, or part of one, that is fetched."""
    s3_anonymous: bool = False
    """Whether S3 is asked without credentials, as public buckets allow."""


def fetch_into(file: BinaryIO, address: str, byte_range: tuple[int, int] | None, config: FetchConfig) -> None:
    """Writes the bytes behind an address into an empty file, in small pieces, and leaves its position at their end.

    Args:
        file: a temporary file, open for writing without a buffer, so that a full disk is found at the write.
        address: ``http://``, ``https://`` or ``s3://bucket/key``.
        byte_range: offset and size of the part that is wanted; None is all of it.
        config: limits, and how often to try.

    Raises:
        FetchError: missing, forbidden, too large or no address; or still throttled, silent or cut off at the last
            attempt. The message does not name the address.
        OSError: no room for the temporary file, which is nothing that the next address could do better; it names the
            folder for temporary files.
    """
    download = _Download(file, address, byte_range, config)
    for attempt in range(1, config.attempts + 1):
        try:
            download.go_on()
            return
        except AttemptError as error:
            failure = error
        if not failure.transient or attempt == config.attempts:
            break
        time.sleep(pause_s(attempt, failure.retry_after_s, config.backoff_s, _JITTER.random()))
    tried = f" (at the last of {attempt} attempts)" if attempt > 1 else ""
    raise FetchError(f"{failure}{tried}", transient=failure.transient) from failure


def pause_s(failures: int, retry_after_s: float, backoff_s: float, draw: float) -> float:
    """Seconds to wait after so many failures, for a draw from [0, 1)."""
    longest_s = min(_LONGEST_PAUSE_S, backoff_s * 2.0 ** (failures - 1))
    return min(_LONGEST_PAUSE_S, retry_after_s) + draw * longest_s


class _Download:
    """A file on its way: what has arrived of it, and of which version."""

    def __init__(self, file: BinaryIO, address: str, byte_range: tuple[int, int] | None, config: FetchConfig) -> None:
        self._file, self._address, self._config = file, address, config
        self._first, size = byte_range or (0, None)
        self._end = None if size is None else self._first + size
        self._version = Version(None, None, None)

    def go_on(self) -> None:
        """One request for all that is missing."""
        if self._end is not None:
            self._check_size(self._end - self._first)
        if self._version.size is None:
            self._start_over()  # nothing could tell whether the rest is of the same version
        arrived = self._file.tell()
        position = self._first + arrived
        limits = self._config
        try:
            with ask(
                self._address,
                position,
                self._end,
                timeout_s=limits.timeout_s,
                s3_anonymous=limits.s3_anonymous,
            ) as answer:
                if arrived and answer.first == position and answer.version != self._version:
                    raise self._changed()
                if answer.first != position:  # the whole file, from a server without ranges
                    self._start_over()
                self._version = answer.version
                self._receive(answer)
        except RangeRefusedError as error:
            raise self._changed() if arrived else error from error

    def _receive(self, answer: Answer) -> None:
        end, size = self._end, answer.version.size
        if end is not None and size is not None and size < end:
            raise AttemptError(
                f"bytes {self._first} to {end} were expected in a file that holds {size}; it was cut off or changed",
                transient=False,
            )
        until = size if end is None else end
        wanted = None if until is None else until - self._first
        if wanted is not None:
            self._check_size(wanted)
        # Of a server without ranges: what lies before the range.
        to_skip = self._first + self._file.tell() - answer.first
        while (wanted is None or self._file.tell() < wanted) and (piece := answer.read(_CHUNK_BYTES)):
            skipped = min(to_skip, len(piece))
            to_skip -= skipped
            self._write(piece[skipped:] if wanted is None else piece[skipped : skipped + wanted - self._file.tell()])
        if wanted is not None and self._file.tell() < wanted:
            raise AttemptError(f"cut short: {self._file.tell()} bytes came, expected {wanted}", transient=True)

    def _write(self, piece: bytes) -> None:
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error
            reason = f"the temporary file cannot be written: {error.strerror or error}"
            raise FetchError(reason, transient=True) from error
        self._check_size(self._file.tell())

    def _check_size(self, size: int) -> None:
        if size > (limit := self._config.max_bytes):
            raise AttemptError(f"too large: {size} bytes or more, expected at most max_bytes={limit}", transient=False)

    def _changed(self) -> AttemptError:
        self._start_over()
        return AttemptError("the file was changed while it was fetched", transient=True)

    def _start_over(self) -> None:
        self._file.seek(0)
        self._file.truncate()
