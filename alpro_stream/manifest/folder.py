"""A folder of media with captions in text files beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.columns import Entry
from alpro_stream.manifest.lines import cannot_read
from alpro_stream.manifest.rows import IMAGE_SUFFIXES, MAX_TEXT_BYTES, VIDEO_SUFFIXES, BadFieldError, RejectedRow
from alpro_stream.manifest.sidecar import METADATA_SUFFIX, TEXT_SUFFIX, sidecar_values


def folder_entries(folder: Path) -> Iterator[Entry | RejectedRow]:
    """The media below a folder, sorted by name in each folder; hidden files and linked folders are left out.

    Raises:
        ManifestError: a folder cannot be read, or there are no media.
    """
    number = 0
    for path in _media_below(folder):
        number += 1
        name = path.relative_to(folder).as_posix()
        try:
            text, metadata = (_contents(path.with_suffix(suffix)) for suffix in (TEXT_SUFFIX, METADATA_SUFFIX))
            values = sidecar_values(text, metadata, one_a_line=True)
        except BadFieldError as error:
            yield RejectedRow(number, name, str(error))
            continue
        if text is None and metadata is None:
            expected = f"{path.stem}{TEXT_SUFFIX} or {path.stem}{METADATA_SUFFIX}"
            yield RejectedRow(number, name, f"no captions beside it; expected {expected}")
        else:
            yield Entry(number, {"id": name, **values, "media": name})
    if number == 0:
        raise ManifestError(f"{folder} holds no videos or images; expected media with {TEXT_SUFFIX} files beside them")


def _media_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise cannot_read(Path(error.filename), error) from error

    for directory, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (most names are no media and need no Path)
            if (suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES) and not name.startswith("."):
                yield Path(directory, name)


def _contents(path: Path) -> bytes | None:
    """The beginning of a file, one byte more than is allowed; None when there is no such file."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise BadFieldError(f"its {path.suffix} cannot be read: {error.strerror or error}") from error
