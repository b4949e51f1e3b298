"""The manifest: one JSON object a line, each a video or an image with its captions and questions.

Keys of a row: ``id`` (unique), ``media`` (path relative to the manifest's folder), ``captions`` (at least one),
``qa`` (``[{"question": ..., "answer": ...}]``), ``start_s``, ``end_s``, ``split`` (default ``train``) and ``kind``
(``video`` or ``image``; by the file's suffix when absent). Unknown keys are ignored: manifests carry notes.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from alpro_stream.errors import ManifestError

Kind = Literal["video", "image"]

KINDS: tuple[Kind, ...] = ("video", "image")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
# Longer lines are refused before they are parsed: a caption of megabytes is a broken export, not a caption.
MAX_LINE_BYTES = 1 << 20
MAX_KEY_LENGTH = 80
MAX_SECONDS = 1e7  # four months; more is a mistake in the unit

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY_UNSAFE = re.compile(r"_(?=x)|[^A-Za-z0-9_-]")


class QA(NamedTuple):
    """A question about the clip and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One usable row.

    Attributes:
        id: the user's name for the clip, unique in the manifest.
        media: path of the file, relative to the manifest's folder.
        captions: at least one.
        qa: questions with answers, possibly none.
        start_s: where the clip starts in the file, None for its beginning.
        end_s: where the clip ends in the file (exclusive), None for its end.
        split: which shard set the sample goes to.
        kind: video or image.
        line: line of the manifest, counted from 1.
    """

    id: str
    media: str
    captions: tuple[str, ...]
    qa: tuple[QA, ...]
    start_s: float | None
    end_s: float | None
    split: str
    kind: Kind
    line: int


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A line that gives no sample: where it is, whose it is (when that could be read) and why."""

    line: int
    id: str | None
    reason: str


def read_manifest(path: str | Path) -> Iterator[ManifestRow | RejectedRow]:
    """Reads a manifest row by row; a bad row is returned as a `RejectedRow`, it never raises.

    Empty lines are skipped. Of rows with the same id the first stands.

    Raises:
        ManifestError: the file is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"no such manifest: {path}; expected a file of JSON lines")
    # 16 bytes of a digest instead of the id: a manifest has millions of rows.
    first_line_of: dict[bytes, int] = {}
    for line, text in _lines(path):
        row = _parse_line(line, text)
        if isinstance(row, ManifestRow):
            digest = hashlib.blake2b(row.id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            first = first_line_of.setdefault(digest, line)
            if first != line:
                row = RejectedRow(line, row.id, f"duplicate id {row.id!r}: first used on line {first}")
        yield row


def sample_key(row_id: str) -> str:
    """The name of a sample inside a shard, made from its id; different ids give different keys.

    Letters, digits, ``-`` and ``_`` stay, every other character becomes ``_x<hex code point>_``; so does an ``_``
    before an ``x``, which would read as an escape. A dot would end the key (WebDataset splits names at the first
    dot), a slash would leave the target folder. Keys over 80 characters keep their first 40 and a digest of the id.
    """
    key = _KEY_UNSAFE.sub(lambda match: f"_x{ord(match[0]):x}_", row_id)
    if len(key) > MAX_KEY_LENGTH:
        digest = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).hexdigest()
        key = f"{key[:40]}_xh{digest[:32]}"
    return key


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-empty lines with their numbers; of an over-long line only a little more than the limit is held."""
    try:
        with path.open("rb") as stream:
            line = 0
            while text := stream.readline(MAX_LINE_BYTES + 1):
                line += 1
                rest = text
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_LINE_BYTES + 1)
                if text.strip():
                    yield line, text
    except OSError as error:
        raise ManifestError(f"cannot read the manifest {path}: {error.strerror or error}") from error


def _parse_line(line: int, text: bytes) -> ManifestRow | RejectedRow:
    if len(text) > MAX_LINE_BYTES:
        return RejectedRow(line, None, f"longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = json.loads(text.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return RejectedRow(line, None, f"not UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return RejectedRow(line, None, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return RejectedRow(line, None, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return RejectedRow(line, None, f"expected a JSON object, found {_type_name(fields)}")
    row_id = fields.get("id")
    try:
        return _row_from_fields(line, fields)
    except _BadFieldError as error:
        return RejectedRow(line, row_id if isinstance(row_id, str) else None, str(error))


class _BadFieldError(ValueError):
    """A field of a row that cannot be used; the message is the row's reason."""


def _row_from_fields(line: int, fields: dict[str, Any]) -> ManifestRow:
    media = _text(fields, "media")
    start_s, end_s = _seconds(fields, "start_s"), _seconds(fields, "end_s")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise _BadFieldError(f"'end_s' is {end_s}, not after the start at {start_s or 0.0}")
    split = fields.get("split") or "train"
    if not isinstance(split, str) or not _SPLIT_NAME.fullmatch(split):
        raise _BadFieldError(f"'split' is {split!r}; expected letters, digits, '-' or '_'")
    kind = fields.get("kind") or kind_of(media)
    if kind not in KINDS:
        raise _BadFieldError(f"'kind' is {kind!r}; expected 'video' or 'image'")
    return ManifestRow(
        id=_text(fields, "id"),
        media=media,
        captions=_captions(fields),
        qa=_questions(fields),
        start_s=start_s,
        end_s=end_s,
        split=split,
        kind=kind,
        line=line,
    )


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise _BadFieldError(f"no {name!r}")
    if not isinstance(value, str) or not value.strip():
        raise _BadFieldError(f"{name!r} is {_short(value)}; expected a text that is not empty")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    """JSON can spell lone surrogates, which no UTF-8 file can hold."""
    if any("\ud800" <= character <= "\udfff" for character in value) or "\0" in value:
        raise _BadFieldError(f"{name!r} holds characters that are no text (a lone surrogate or NUL)")
    return value


def _captions(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("captions")
    if value is None or value == []:
        raise _BadFieldError("no caption: 'captions' needs at least one text")
    if not isinstance(value, list):
        raise _BadFieldError(f"'captions' is {_short(value)}; expected a list of texts")
    captions = tuple(_one_line(caption, "captions") for caption in value)
    if not all(captions):
        raise _BadFieldError("'captions' holds an empty text")
    return captions


def _questions(fields: dict[str, Any]) -> tuple[QA, ...]:
    value = fields.get("qa") or []
    if not isinstance(value, list) or not all(isinstance(pair, dict) for pair in value):
        raise _BadFieldError(f"'qa' is {_short(value)}; expected a list of {{question, answer}}")
    pairs = tuple(QA(_one_line(p.get("question"), "question"), _one_line(p.get("answer"), "answer")) for p in value)
    if not all(pair.question and pair.answer for pair in pairs):
        raise _BadFieldError("'qa' holds an empty question or answer")
    return pairs


def _one_line(value: Any, name: str) -> str:
    """The text with runs of white space (line breaks among them) made one space."""
    if not isinstance(value, str):
        raise _BadFieldError(f"{name!r} holds {_short(value)}; expected a text")
    return " ".join(_encodable(value, name).split())


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_SECONDS:
        raise _BadFieldError(f"{name!r} is {_short(value)}; expected seconds between 0 and {MAX_SECONDS:.0f}")
    return float(value)


def kind_of(media: str) -> Kind:
    """Image or video, by the suffix of the name."""
    return "image" if PurePosixPath(media).suffix.lower() in IMAGE_SUFFIXES else "video"


def _type_name(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "an object")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
