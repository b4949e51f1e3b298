"""Tables with named columns: CSV, TSV and Parquet, read row by row."""

import csv
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.columns import Entry
from alpro_stream.manifest.lines import cannot_read, numbered_lines
from alpro_stream.manifest.rows import MAX_TEXT_BYTES, RejectedRow

_PARQUET_BATCH_ROWS = 1000


def csv_header(path: Path, delimiter: str) -> tuple[str, ...]:
    """The names of the columns.

    Raises:
        ManifestError: the file cannot be read, or its first row is no header.
    """
    for row in _csv_rows(path, delimiter):
        if isinstance(row, RejectedRow):
            raise ManifestError(f"{path}: the header cannot be read: {row.reason}")
        return tuple(row[1])
    raise ManifestError(f"{path} is empty; expected a header with the names of the columns")


def csv_entries(path: Path, delimiter: str) -> Iterator[Entry | RejectedRow]:
    """The rows below the header; a row is numbered by the line it begins on.

    Raises:
        ManifestError: the file cannot be read.
    """
    rows = _csv_rows(path, delimiter)
    header = next(rows, None)
    if header is None or isinstance(header, RejectedRow):
        return  # `csv_header` says why
    names = header[1]
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        line, cells = row
        if len(cells) != len(names):
            found = f"{len(cells)} columns where the header has {len(names)}"
            yield RejectedRow(line, None, f"{found}; a text that holds the delimiter must stand in quotes")
        else:
            yield Entry(line, dict(zip(names, cells, strict=True)))


def parquet_header(path: Path) -> tuple[str, ...]:
    """The names of the columns.

    Raises:
        ManifestError: the file cannot be read, or pyarrow is missing.
    """
    with _open_parquet(path) as table:
        return tuple(table.schema_arrow.names)


def parquet_entries(path: Path, columns: Collection[str]) -> Iterator[Entry | RejectedRow]:
    """The rows, in parts; only the given columns are read.

    Raises:
        ManifestError: the file cannot be read or is damaged, or pyarrow is missing.
    """
    import pyarrow

    line = 0
    with _open_parquet(path) as table:
        try:
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=sorted(columns), use_threads=False):
                for values in _rows_of(batch):
                    line += 1
                    yield RejectedRow(line, None, values) if isinstance(values, str) else Entry(line, values)
        except (pyarrow.ArrowException, OSError) as error:
            raise ManifestError(f"{path} is damaged behind row {line}: {error}") from error


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, or why one cannot be read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield f"not UTF-8 (byte {error.start} of a text)"
            return
        for number in range(batch.num_rows):
            yield from _rows_of(batch.slice(number, 1))


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ManifestError(f"reading {path} needs pyarrow: pip install pyarrow, or convert the file to CSV") from error
    try:
        return ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ManifestError(f"{path} is no Parquet file that can be read: {error}") from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]] | RejectedRow]:
    # The limit is one of the whole process; ours is that of a line, which `_Lines` keeps.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT_BYTES))
    lines = _Lines(path)
    # Strict, because the reader else takes everything behind a stray quote for one cell, without a word.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _TooLongError) as error:
            first = lines.row[0][0]
            yield RejectedRow(first, None, _explain(error, first, len(lines.row)))
            lines.go_back()
            continue
        first = lines.row[0][0]
        if lines.not_utf8:
            yield RejectedRow(first, None, lines.not_utf8)
        elif cells:
            yield first, cells


def _explain(error: Exception, line: int, num_lines: int) -> str:
    if num_lines > 1 or "unexpected end" in str(error):
        return f"a quote in the row that begins on line {line} is never closed"
    if isinstance(error, _TooLongError):
        return f"longer than {MAX_TEXT_BYTES} bytes"
    return f"not CSV: {error}; a quote inside of a quoted text is written twice"


class _TooLongError(Exception):
    """A row grows beyond the limit."""


class _Lines:
    """The lines of a file for `csv.reader`, which remembers those of the row in progress.

    A quote that is never closed swallows the lines behind it. Going back to them costs only the row with the quote.
    """

    def __init__(self, path: Path) -> None:
        self._lines = numbered_lines(path)
        self._again: deque[tuple[int, bytes]] = deque()
        self.begin_row()

    def begin_row(self) -> None:
        self.row: list[tuple[int, bytes]] = []
        self.not_utf8: str | None = None
        self._num_bytes = 0

    def go_back(self) -> None:
        """Gives the lines of the row again, all but the first."""
        self._again.extendleft(reversed(self.row[1:]))

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line, data = self._again.popleft() if self._again else next(self._lines)
        self.row.append((line, data))
        self._num_bytes += len(data)
        if self._num_bytes > MAX_TEXT_BYTES:
            raise _TooLongError
        try:
            return data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self.not_utf8 = self.not_utf8 or f"not UTF-8 (byte {error.start} of line {line})"
            return data.decode("utf-8", "replace")
