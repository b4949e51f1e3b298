"""Lines of text files and JSON, with bounded memory and a reason for each line that cannot be used."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.columns import Entry
from alpro_stream.manifest.rows import MAX_TEXT_BYTES, RejectedRow, type_name

_JSON_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def cannot_read(path: Path, error: Exception) -> ManifestError:
    """The error for a file that the system does not let us read."""
    return ManifestError(f"cannot read the manifest {path}: {getattr(error, 'strerror', None) or error}")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """All lines with their numbers from 1; of an over-long line only a little more than the limit is held.

    Raises:
        ManifestError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            line = 0
            while data := stream.readline(MAX_TEXT_BYTES + 1):
                line += 1
                rest = data
                while len(rest) > MAX_TEXT_BYTES and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_TEXT_BYTES + 1)
                yield line, data
    except OSError as error:
        raise cannot_read(path, error) from error


def text_lines(path: Path) -> Iterator[tuple[int, str] | RejectedRow]:
    """The lines that are not empty, as text; rejected ones in between.

    Raises:
        ManifestError: the file cannot be read.
    """
    for line, data in numbered_lines(path):
        if len(data) > MAX_TEXT_BYTES:
            yield RejectedRow(line, None, f"longer than {MAX_TEXT_BYTES} bytes")
        elif data.strip():
            try:
                yield line, data.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield RejectedRow(line, None, f"not UTF-8 (byte {error.start} of the line)")


def entries_of_lines(
    path: Path, parse: Callable[[int, str], Entry | RejectedRow | None]
) -> Iterator[Entry | RejectedRow]:
    """What each line that is not empty says.

    Args:
        path: the file.
        parse: from the number of a line and its text; None for a line that says nothing.

    Raises:
        ManifestError: the file cannot be read.
    """
    for item in text_lines(path):
        found = item if isinstance(item, RejectedRow) else parse(*item)
        if found is not None:
            yield found


def json_lines(path: Path) -> Iterator[Entry | RejectedRow]:
    """One JSON object a line.

    Raises:
        ManifestError: the file cannot be read.
    """
    return entries_of_lines(path, _json_entry)


def json_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """The objects of a JSON list, which is read whole, or of JSON lines.

    Raises:
        ManifestError: the file cannot be read, or the list is broken.
    """
    try:
        with path.open("rb") as stream:
            # The first sign may stand behind a byte order mark and any amount of white space.
            start = stream.read(1 << 16).removeprefix(_BYTE_ORDER_MARK).lstrip(_JSON_SPACE)
    except OSError as error:
        raise cannot_read(path, error) from error
    if not start.startswith(b"["):
        yield from json_lines(path)
        return
    for number, values in enumerate(json_document(path), 1):
        yield _entry(number, values)


def json_document(path: Path) -> Any:
    """A whole file of JSON.

    Raises:
        ManifestError: it cannot be read, is not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise cannot_read(path, error) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON: {explain_json(error)}; is it complete?") from error


def explain_json(error: Exception) -> str:
    """What is wrong and where, of an error of Python's JSON reader."""
    if isinstance(error, json.JSONDecodeError):
        where = f"character {error.colno}" if error.lineno == 1 else f"line {error.lineno}, character {error.colno}"
        return f"{error.msg.removesuffix(' at')} at {where}"
    return str(error)


def _json_entry(line: int, text: str) -> Entry | RejectedRow:
    try:
        return _entry(line, json.loads(text.rstrip()))
    except (ValueError, RecursionError) as error:
        return RejectedRow(line, None, f"not JSON: {explain_json(error)}")


def _entry(line: int, values: Any) -> Entry | RejectedRow:
    if not isinstance(values, dict):
        return RejectedRow(line, None, f"expected a JSON object, found {type_name(values)}")
    return Entry(line, values)
