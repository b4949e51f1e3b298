"""Files appear whole or not at all: written under a hidden temporary name, flushed to disk, then renamed."""

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary_beside(path: Path) -> Path:
    """A hidden name in the folder of `path`; two writers of the same file get different ones."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished temporary file, whose contents are flushed already, its real name."""
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself survives a power cut
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, data: bytes) -> None:
    """Writes a small file atomically.

    Raises:
        OSError: the folder is missing, read-only or full; no temporary file is left.
    """
    publish_chunks(path, [data])


def publish_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file atomically, piece by piece.

    Raises:
        OSError: as `publish_bytes`.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_temporaries(directory: Path) -> int:
    """Removes what killed writers left in a folder; returns how many files that were."""
    leftovers = list(directory.glob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)
