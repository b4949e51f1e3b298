"""Files of a data set beside its shards, in a folder or behind an address."""

import io
import os
from pathlib import Path

from alpro_stream.errors import FetchError, ShardError
from alpro_stream.manifest.places import is_address, public_place, scheme_of
from alpro_stream.media.remote import FetchConfig, fetch_into


def read_file(place: str, fetch: FetchConfig) -> bytes:
    """The contents of a small file.

    Args:
        place: a path, ``s3://bucket/key`` or an address of http(s).
        fetch: limits, and how often to try.

    Raises:
        ShardError: missing, forbidden, throttled, cut short and so on, in these words; it names the place without what
            may be secret in an address.
    """
    try:
        if not is_address(place):
            return Path(place).read_bytes()
        file = io.BytesIO()
        fetch_into(file, place, None, fetch)
        return file.getvalue()
    except FileNotFoundError as error:
        raise ShardError(f"{place}: missing: no such file") from error
    except PermissionError as error:
        raise ShardError(f"{place}: forbidden: no permission to read it") from error
    except (OSError, FetchError) as error:
        raise ShardError(f"{public_place(place)}: {getattr(error, 'strerror', None) or error}") from error


def join(place: str, name: str) -> str:
    """The path or address of a file in a folder; what an http(s) address asks for after ``?`` stays at its end.

    Args:
        place: a path or an address, with or without a slash at its end.
        name: relative, with ``/`` between folders.
    """
    if not is_address(place):
        return os.path.join(place, name)  # noqa: PTH118
    # In S3 a question mark is part of the key.
    folder, mark, query = (place, "", "") if scheme_of(place) == "s3" else place.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
