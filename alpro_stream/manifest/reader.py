"""Reads a corpus of any known format as one stream of rows."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import get_args

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import published
from alpro_stream.manifest.columns import Columns, Entry, add_fields, columns_of_table, columns_read
from alpro_stream.manifest.folder import folder_entries
from alpro_stream.manifest.lines import cannot_read, json_entries, json_lines, text_lines
from alpro_stream.manifest.options import Format, ManifestConfig
from alpro_stream.manifest.places import holds_user, is_address, manifest_folder
from alpro_stream.manifest.rows import QA, BadFieldError, ManifestRow, RejectedRow, row_from_fields
from alpro_stream.manifest.tables import csv_entries, csv_header, parquet_entries, parquet_header
from alpro_stream.manifest.webdataset import is_tar_name, tar_entries

_DEFAULT = ManifestConfig()
_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A format: how its entries are found, and which of their values are which field.

    Attributes:
        entries: reads the file; of a table also given the columns that are needed.
        columns: the mapping, unless the configuration says otherwise.
        header: of a table, reads the names of its columns; fields that are not mapped are columns of their own name.
        own_names: keys of an entry that are not mapped are our fields as they are.
        grouped: several entries may be of one clip, whose captions and questions are collected; the file is read whole.
        places_media: the format itself says where the media are.
    """

    entries: Callable[..., Iterator[Entry | RejectedRow]]
    columns: Columns = field(default_factory=dict)
    header: Callable[[Path], tuple[str, ...]] | None = None
    own_names: bool = False
    grouped: bool = False
    places_media: bool = False


def _delimited(delimiter: str, columns: Columns | None = None) -> _Layout:
    def entries(path: Path, _columns: set[str]) -> Iterator[Entry | RejectedRow]:
        return csv_entries(path, delimiter)

    return _Layout(entries, columns or {}, partial(csv_header, delimiter=delimiter))


_LAYOUTS: dict[Format, _Layout] = {
    "jsonl": _Layout(json_lines, own_names=True),
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "parquet": _Layout(parquet_entries, header=parquet_header),
    "webvid": _delimited(",", {"id": "videoid", "media": "{page_dir}/{videoid}.mp4", "captions": "name"}),
    "cc3m": _Layout(published.cc3m_entries, {"id": "{line}", "media": "url", "captions": "caption", "kind": "kind"}),
    # Without start and end: the clips are distributed cut.
    "msrvtt": _Layout(
        published.msrvtt_entries,
        {"id": "video_id", "media": "{video_id}.mp4", "captions": "captions", "split": "split"},
    ),
    "didemo": _Layout(published.didemo_entries, {"id": "video", "media": "video", "captions": "description"}),
    "msvd": _Layout(published.msvd_entries, {"id": "name", "media": "{name}.avi", "captions": "caption"}, grouped=True),
    "msrvtt_qa": _Layout(
        json_entries,
        {"id": "video{video_id}", "media": "video{video_id}.mp4", "question": "question", "answer": "answer"},
        grouped=True,
    ),
    "msvd_qa": _Layout(
        published.msvd_qa_entries,
        {"id": "name", "media": "{name}.avi", "question": "question", "answer": "answer"},
        grouped=True,
    ),
    # Retrieval and question answering name clips without a suffix, pre-training gives paths.
    "alpro": _Layout(
        json_entries,
        {
            "id": ["clip_name", "video_id", "video", "image"],
            "media": ["{clip_name}.mp4", "{video_id}.mp4", "video", "image"],
            "captions": ["caption", "text"],
            "question": "question",
            "answer": "answer",
        },
        grouped=True,
    ),
    "lavis": _Layout(
        json_entries,
        {
            "id": ["video", "image"],
            "media": ["video", "image"],
            "captions": "caption",
            "question": "question",
            "answer": "answer",
        },
        grouped=True,
    ),
    "folder": _Layout(folder_entries, own_names=True, places_media=True),
    "webdataset": _Layout(
        tar_entries,
        {"id": "key", "media": "media", "kind": "kind", "captions": "captions", "license": "license"},
        places_media=True,
    ),
}


def read_manifest(path: str | Path, config: ManifestConfig = _DEFAULT) -> Iterator[ManifestRow | RejectedRow]:
    """Reads a corpus row by row; a bad row is returned as a `RejectedRow`, it never raises.

    Rows come in the order of the file, always the same. Duplicate ids are not looked for here, see `survey`.

    Args:
        path: a file, a folder, or a pattern of tars.
        config: how to read it.

    Raises:
        ManifestError: it is missing or cannot be read, its format is not known, or a column is missing.
    """
    try:
        format_ = _format_of(path, config)
    except OSError as error:
        raise cannot_read(Path(path), error) from error
    layout = _LAYOUTS[format_]
    path = Path(path)
    columns: Columns = {**layout.columns, **config.columns}
    if layout.places_media and "media" in config.columns:
        raise ManifestError(
            f"reading.columns.media cannot be set for the format {format_}, which finds its media itself"
        )
    if layout.header is not None:
        columns = columns_of_table(path, columns, layout.header(path))
        entries = layout.entries(path, columns_read(columns))
    else:
        entries = layout.entries(path)
    split_of = _read_splits(config)
    rows = (_row(entry, columns, layout, config.split, split_of) for entry in entries)
    for row in _grouped(rows) if layout.grouped else rows:
        yield _printable(row) if isinstance(row, RejectedRow) else row


def media_root(path: str | Path, config: ManifestConfig = _DEFAULT) -> str:
    """The absolute path or the address that relative media paths of a manifest start from."""
    if config.media_root is None:
        return str(manifest_folder(path))
    return config.media_root if is_address(config.media_root) else str(Path(config.media_root).absolute())


def _format_of(path: str | Path, config: ManifestConfig) -> Format:
    place = Path(path)
    is_folder, is_tars = place.is_dir(), is_tar_name(place.name)
    if config.format in ("folder", "webdataset") or is_folder or is_tars:
        if config.format == "folder" and not is_folder:
            raise ManifestError(f"no such folder: {place}")
        if is_folder and config.format not in (None, "folder", "webdataset"):
            raise ManifestError(f"{place} is a folder; a manifest of the format {config.format} is a file")
        holds_tars = is_tars or (is_folder and any(is_tar_name(child.name) for child in place.iterdir()))
        return config.format or ("webdataset" if holds_tars else "folder")
    if not place.is_file():
        raise ManifestError(f"no such manifest: {path}; expected a file, a folder of media, or tars, on a local path")
    known = config.format or _FORMAT_OF_SUFFIX.get(place.suffix.lower())
    if known is None:
        formats = ", ".join(get_args(Format))
        raise ManifestError(f"{place}: the suffix does not tell the format; set reading.format to one of {formats}")
    return known


def _row(
    entry: Entry | RejectedRow, columns: Columns, layout: _Layout, split: str, split_of: dict[str, str]
) -> ManifestRow | RejectedRow:
    if isinstance(entry, RejectedRow):
        return entry
    fields = dict(entry.values) if layout.own_names else {}
    try:
        add_fields(fields, columns, entry)
        row_id = fields.get("id")
        listed = split_of.get(row_id) if isinstance(row_id, str) else None
        fields["split"] = listed or fields.get("split") or split
        return row_from_fields(entry.line, fields, entry.byte_range)
    except BadFieldError as error:
        row_id = fields.get("id")
        # Some formats take the address for the id, and with it the password that it is refused for.
        named = isinstance(row_id, str) and not holds_user(row_id)
        return RejectedRow(entry.line, row_id if named else None, str(error))


def _printable(row: RejectedRow) -> RejectedRow:
    """The row with what is no text written in escapes: names of files may be any bytes."""
    row_id, reason = (text and text.encode("utf-8", "backslashreplace").decode() for text in (row.id, row.reason))
    return RejectedRow(row.line, row_id, reason or "")


def _grouped(rows: Iterable[ManifestRow | RejectedRow]) -> Iterator[ManifestRow | RejectedRow]:
    """One row for each id, where its first one was, with the captions and questions of all."""
    collected: deque[tuple[ManifestRow, list[str], list[QA]] | RejectedRow] = deque()
    texts_of: dict[str, tuple[list[str], list[QA]]] = {}
    for row in rows:
        if isinstance(row, RejectedRow):
            collected.append(row)
        elif (texts := texts_of.get(row.id)) is not None:
            texts[0].extend(row.captions)
            texts[1].extend(row.qa)
        else:
            texts_of[row.id] = texts = (list(row.captions), list(row.qa))
            collected.append((row, *texts))
    texts_of.clear()
    while collected:  # so that what is used already is not held
        item = collected.popleft()
        yield item if isinstance(item, RejectedRow) else replace(item[0], captions=tuple(item[1]), qa=tuple(item[2]))


def _read_splits(config: ManifestConfig) -> dict[str, str]:
    """The split of each id that a list names."""
    split_of: dict[str, str] = {}
    for split, file in config.splits.items():
        for item in text_lines(Path(file)):
            if isinstance(item, RejectedRow):
                raise ManifestError(f"{file}, line {item.line}: {item.reason}; expected one id a line")
            row_id = item[1].strip()
            if split_of.setdefault(row_id, split) != split:
                raise ManifestError(f"{file}, line {item[0]}: {row_id!r} is in the list of {split_of[row_id]!r} too")
    return split_of
