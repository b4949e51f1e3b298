"""Which column of a file is which field of a row."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.rows import BadFieldError, shortened

FIELDS = ("id", "media", "captions", "split", "kind", "start_s", "end_s", "question", "answer", "license")
LINE = "line"

_SECONDS = ("start_s", "end_s")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")

Columns = Mapping[str, str | list[str]]
"""Field -> column, template, or a list of these."""


class Entry(NamedTuple):
    """What a file says of one row.

    Attributes:
        line: number of its line or entry, from 1.
        values: by the column or key of the file.
        byte_range: offset and size of the medium in its file, None for all of it.
    """

    line: int
    values: dict[str, Any]
    byte_range: tuple[int, int] | None = None


def columns_read(columns: Columns) -> set[str]:
    """The names of all columns that a mapping reads."""
    names: set[str] = set()
    for sources in columns.values():
        for source in _listed(sources):
            placeholders = _PLACEHOLDER.findall(source)
            names.update(set(placeholders) - {LINE} if placeholders else [source])
    return names


def columns_of_table(path: Path, columns: Columns, header: Sequence[str]) -> Columns:
    """The mapping of a table: fields that are not mapped are the columns of their own name.

    Raises:
        ManifestError: a column that the table does not have or has twice, or none for a field that every row needs.
    """
    own = {field: field for field in FIELDS if field in header}
    if "captions" not in own and "caption" in header:
        own["captions"] = "caption"
    complete = {**own, **columns}
    named = f"the columns of {path} are {', '.join(header)}"
    if unknown := sorted(columns_read(complete) - set(header)):
        raise ManifestError(f"no column {', '.join(map(repr, unknown))}: {named}; correct reading.columns")
    if twice := sorted(name for name in columns_read(complete) if header.count(name) > 1):
        raise ManifestError(f"more than one column {', '.join(map(repr, twice))}: {named}; rename all but one")
    needed = ("id", "media") if "question" in complete else ("id", "media", "captions")
    if missing := [field for field in needed if field not in complete]:
        example = ", ".join(f"{field}: COLUMN" for field in missing)
        raise ManifestError(f"no column for {', '.join(missing)}: {named}; set reading.columns={{{example}}}")
    return complete


def add_fields(fields: dict[str, Any], columns: Columns, entry: Entry) -> None:
    """Adds the mapped fields of a row, as `row_from_fields` takes them, the id first.

    A text becomes a list of one caption, a number an id, a text of digits seconds. Where questions are mapped and there
    is no caption, the question stands as one, since every sample needs a text.

    Raises:
        BadFieldError: a template needs a column that is empty here.
    """
    for field in FIELDS:
        sources = columns.get(field)
        if sources is None:
            continue
        if field == "captions":
            fields[field] = [text for source in _listed(sources) for text in _texts(_value(field, source, entry, True))]
        else:
            fields[field] = _first(field, _listed(sources), entry)
    for field in _SECONDS:
        if field in columns:
            fields[field] = _number(fields[field])
    question, answer = fields.pop("question", None), fields.pop("answer", None)
    if question is not None or answer is not None:
        fields["qa"] = [{"question": question, "answer": text} for text in _distinct(answer)]
        if question is not None and not fields.get("captions"):
            fields["captions"] = [question]


def _listed(sources: str | list[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _first(field: str, sources: list[str], entry: Entry) -> Any:
    """The first value that is there; a template that lacks one of its columns only counts as missing among several."""
    for source in sources:
        value = _value(field, source, entry, len(sources) > 1)
        if value is not None:
            return value
    return None


def _value(field: str, source: str, entry: Entry, may_lack: bool) -> Any:
    if not _PLACEHOLDER.search(source):
        value = _present(entry.values.get(source))
        is_text = field not in _SECONDS
        return str(value) if is_text and type(value) is int else value
    parts: list[str] = []
    for number, part in enumerate(_PLACEHOLDER.split(source)):  # texts and placeholders take turns
        value = part if number % 2 == 0 else entry.line if part == LINE else _present(entry.values.get(part))
        if not isinstance(value, str | int | float):
            if may_lack:
                return None
            found = shortened(entry.values.get(part))
            raise BadFieldError(f"{field!r} is made of {source!r}, where {part!r} is {found}")
        parts.append(str(value))
    return "".join(parts)


def _present(value: Any) -> Any:
    """The value, or None for the ways in which tables say that there is none."""
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _texts(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> Any:
    """A text as the number it spells; other texts stay, for the message that refuses them."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _distinct(answer: Any) -> list[Any]:
    """The answers, each once: lists of answers hold one by each of several people."""
    answers = answer if isinstance(answer, list) and answer else [answer]
    texts = [str(text) if isinstance(text, int) and not isinstance(text, bool) else text for text in answers]
    return list({repr(text): text for text in texts}.values())
