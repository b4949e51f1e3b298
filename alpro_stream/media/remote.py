"""Media by address: fetched to a file for as long as it is read."""

import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from alpro_stream.errors import MediaError

SCHEMES = ("http", "https")
TIMEOUT_S = 30.0
"""Longest silence of the server."""


def is_address(place: str) -> bool:
    """Whether a text names something to fetch and not a file: ``scheme://...``."""
    return "://" in place


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """The bytes behind an ``http(s)://`` address as a file, which is removed afterwards.

    Raises:
        MediaError: another scheme, no answer within `TIMEOUT_S`, an error of the server, or a cut-off answer.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise MediaError(f"{address} is no address: {error}") from error
    if parts.scheme not in SCHEMES:
        raise MediaError(f"{address}: cannot fetch {parts.scheme}://; give a file, http:// or https://")
    with tempfile.NamedTemporaryFile() as file:
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
                shutil.copyfileobj(answer, file)
                expected = answer.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            raise MediaError(f"{address}: the server answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MediaError(f"{address} cannot be fetched: {error}") from error
        file.flush()
        size = Path(file.name).stat().st_size
        if expected is not None and size != int(expected):
            raise MediaError(f"{address}: got {size} of {expected} bytes; the connection was cut")
        yield Path(file.name)
