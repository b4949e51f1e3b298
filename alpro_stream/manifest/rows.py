"""One row of a corpus: a video or an image with its captions and questions, checked field by field."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from posixpath import splitext
from typing import Any, Literal, NamedTuple

from alpro_stream.manifest.places import SCHEMES, holds_user, is_address, public_place, scheme_of

Kind = Literal["video", "image"]

KINDS: tuple[Kind, ...] = ("video", "image")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".avi", ".flv", ".ogv", ".mpg", ".mpeg", ".ts", ".wmv"}
)
# Longer lines and texts are refused: a caption of megabytes is a broken export, not a caption.
MAX_TEXT_BYTES = 1 << 20
MAX_KEY_LENGTH = 80
MAX_SECONDS = 1e7  # four months; more is a mistake in the unit
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# JSON can spell lone surrogates, which no UTF-8 file can hold.
_NO_TEXT = re.compile("[\ud800-\udfff\0]")
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
        media: path of the file, relative to the media root, or an address.
        captions: at least one.
        qa: questions with answers, possibly none.
        start_s: where the clip starts in the file, None for its beginning.
        end_s: where the clip ends in the file (exclusive), None for its end.
        split: which shard set the sample goes to.
        kind: video or image.
        line: number of its line (text formats) or entry (lists, tables, tars), counted from 1.
        byte_range: offset and size in bytes of the medium inside the file `media`, None for all of it.
        license: what the manifest says of the licence, None when it says nothing.
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
    byte_range: tuple[int, int] | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A line that gives no sample: where it is, whose it is (when that could be read) and why."""

    line: int
    id: str | None
    reason: str


class BadFieldError(ValueError):
    """A field of a row that cannot be used; the message is the row's reason."""


def row_from_fields(line: int, fields: Mapping[str, Any], byte_range: tuple[int, int] | None = None) -> ManifestRow:
    """Checks the fields of a row; keys that are no fields are ignored, because manifests carry notes.

    Args:
        line: number of its line or entry.
        fields: ``id``, ``media``, ``captions`` (list of texts), ``qa`` (list of ``{question, answer}``), ``start_s``,
            ``end_s``, ``split``, ``kind`` and ``license``, as JSON has them.
        byte_range: offset and size of the medium in its file.

    Raises:
        BadFieldError: a field is missing or cannot be used.
    """
    media = _media(fields)
    start_s, end_s = _seconds(fields, "start_s"), _seconds(fields, "end_s")
    if end_s is not None and end_s <= (start_s or 0.0):
        raise BadFieldError(f"'end_s' is {end_s}, not after the start at {start_s or 0.0}")
    split = fields.get("split") or "train"
    if not isinstance(split, str) or not SPLIT_NAME.fullmatch(split):
        raise BadFieldError(f"'split' is {shortened(split)}; expected letters, digits, '-' or '_'")
    kind = fields.get("kind") or kind_of(media)
    if kind not in KINDS:
        raise BadFieldError(f"'kind' is {shortened(kind)}; expected 'video' or 'image'")
    return ManifestRow(
        id=_text(fields, "id"),
        media=media,
        # First, as an empty question may stand as caption too.
        qa=_questions(fields),
        captions=_captions(fields),
        start_s=start_s,
        end_s=end_s,
        split=split,
        kind=kind,
        line=line,
        byte_range=byte_range,
        license=_license(fields),
    )


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


def kind_of(media: str) -> Kind:
    """Image or video, by the suffix of the name; of an address, what follows ``?`` or ``#`` is no part of the name."""
    if is_address(media):
        media = re.split(r"[?#]", media, maxsplit=1)[0]
    return "image" if splitext(media)[1].lower() in IMAGE_SUFFIXES else "video"


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "an object")


def shortened(value: Any) -> str:
    """The value as Python writes it, cut to what fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise BadFieldError(f"no {name!r}")
    if not isinstance(value, str) or not value.strip():
        raise BadFieldError(f"{name!r} is {shortened(value)}; expected a text that is not empty")
    return _storable(value, name)


def _media(fields: Mapping[str, Any]) -> str:
    media = _text(fields, "media")
    if is_address(media):
        if holds_user(media):  # which would be published with the samples, so the reason does not repeat it either
            raise BadFieldError("'media' holds a user name or password; give credentials in the environment")
        if scheme_of(media) not in SCHEMES:
            found, known = shortened(public_place(media)), ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise BadFieldError(f"'media' is {found}; expected a path, or an address that begins with {known}")
    return media


def _storable(value: str, name: str) -> str:
    if len(value) > MAX_TEXT_BYTES:
        raise BadFieldError(f"{name!r} holds a text longer than {MAX_TEXT_BYTES} characters")
    if _NO_TEXT.search(value):
        raise BadFieldError(f"{name!r} holds characters that are no text (a lone surrogate or NUL)")
    return value


def _captions(fields: Mapping[str, Any]) -> tuple[str, ...]:
    value = fields.get("captions")
    if value is None or value == []:
        raise BadFieldError("no caption: 'captions' needs at least one text")
    if not isinstance(value, list):
        raise BadFieldError(f"'captions' is {shortened(value)}; expected a list of texts")
    captions = tuple(_one_line(caption, "captions") for caption in value)
    if not all(captions):
        raise BadFieldError("'captions' holds an empty text")
    return captions


def _questions(fields: Mapping[str, Any]) -> tuple[QA, ...]:
    value = fields.get("qa") or []
    if not isinstance(value, list) or not all(isinstance(pair, dict) for pair in value):
        raise BadFieldError(f"'qa' is {shortened(value)}; expected a list of {{question, answer}}")
    pairs = tuple(QA(_one_line(p.get("question"), "question"), _one_line(p.get("answer"), "answer")) for p in value)
    if not all(pair.question and pair.answer for pair in pairs):
        raise BadFieldError("'qa' holds an empty question or answer")
    return pairs


def _license(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("license")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # some corpora number their licences
    return None if value is None else _one_line(value, "license") or None


def _one_line(value: Any, name: str) -> str:
    """The text with runs of white space (line breaks among them) made one space."""
    if not isinstance(value, str):
        raise BadFieldError(f"{name!r} holds {shortened(value)}; expected a text")
    return " ".join(_storable(value, name).split())


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_SECONDS:
        raise BadFieldError(f"{name!r} is {shortened(value)}; expected seconds between 0 and {MAX_SECONDS:.0f}")
    return float(value)
