"""What the shard cache says when it cannot do what it should."""

import errno
import os
from pathlib import Path

from alpro_stream.errors import FetchError, ShardError
from alpro_stream.manifest.places import public_place


def disk_error(folder: Path, max_bytes: int, error: OSError) -> ShardError:
    """The folder cannot be used.

    Args:
        folder: of the cache.
        max_bytes: its bound.
        error: what the system says.
    """
    advice = "set stream.cache.folder to one that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = (
            f"make room there, lower stream.cache.max_bytes={max_bytes} to what the disk can hold, or name another "
            "stream.cache.folder"
        )
    return ShardError(f"cannot use the shard cache {folder}: {error.strerror or error}{_at_fault(error)}; {advice}")


def changed_error(address: str, found: str, sha256: str, num_bytes: int | None) -> ShardError:
    """A file is not the one that the data set's description names.

    Args:
        address: of the file.
        found: what it is instead.
        sha256: the digest that was expected.
        num_bytes: the size that was expected, if known.
    """
    size = "" if num_bytes is None else f" ({num_bytes} bytes)"
    return ShardError(
        f"{public_place(address)}: found {found}, expected sha256 {sha256}{size}; the data set was changed after its "
        "dataset.json was read, or the file is damaged: start again, or copy the shards there again"
    )


def too_large_error(address: str, num_bytes: int, max_bytes: int) -> ShardError:
    """A file that never fits."""
    return ShardError(
        f"{public_place(address)}: {num_bytes} bytes or more, which the shard cache cannot hold: "
        f"stream.cache.max_bytes={max_bytes}; raise stream.cache.max_bytes, or make smaller shards"
    )


def may_pass(failure: ShardError) -> bool:
    """Whether the same fetch may succeed later."""
    cause = failure.__cause__
    return isinstance(cause, OSError) or (isinstance(cause, FetchError) and cause.transient)


def _at_fault(error: OSError) -> str:
    """What the system's error is about, in brackets, and whose it is where that matters; nothing if unknown."""
    if error.filename is None:
        return ""
    path = Path(os.fsdecode(error.filename))
    # Those of `os.path` say no where a path may not be looked at; those of Path raise.
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
        return f" ({path} is a link to {path.readlink()}, which is not there)"
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    if not isinstance(error, PermissionError):
        return f" ({there})"
    try:
        owner = there.owner()
    except (OSError, KeyError):  # a user without a name, or nothing that may be looked at
        return f" ({there})"
    return f" ({there} belongs to {owner}; users who share the folder need a common group, and umask 002)"
