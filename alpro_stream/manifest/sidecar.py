"""Captions in small files beside the media: ``.txt`` and ``.json``."""

import json
from typing import Any

from alpro_stream.manifest.lines import explain_json
from alpro_stream.manifest.rows import MAX_TEXT_BYTES, BadFieldError, type_name

TEXT_SUFFIX = ".txt"
METADATA_SUFFIX = ".json"


def sidecar_values(text: bytes | None, metadata: bytes | None, *, one_a_line: bool) -> dict[str, Any]:
    """What the files beside a medium say; the captions are under ``captions``, those of the text file if it has some.

    Args:
        text: contents of the ``.txt``, None when there is none.
        metadata: contents of the ``.json``, an object with ``caption`` or ``captions``, None when there is none.
        one_a_line: whether each line of the text is a caption; else all of it is one.

    Raises:
        BadFieldError: a file is too large, not UTF-8, or not JSON.
    """
    values: dict[str, Any] = {}
    if metadata is not None:
        values = _object(_decoded(metadata, METADATA_SUFFIX))
        if values.get("captions") is None:
            caption = values.get("caption")
            values["captions"] = caption if isinstance(caption, list) else [caption] if caption else []
    if text is not None:
        content = _decoded(text, TEXT_SUFFIX)
        captions = [line for line in (content.splitlines() if one_a_line else [content]) if line.strip()]
        if captions or metadata is None:
            values["captions"] = captions
    return values


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFieldError(f"its {METADATA_SUFFIX} is not JSON: {explain_json(error)}") from error
    if not isinstance(values, dict):
        raise BadFieldError(f"its {METADATA_SUFFIX} holds {type_name(values)}; expected an object")
    return values


def _decoded(data: bytes, suffix: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadFieldError(f"its {suffix} is longer than {MAX_TEXT_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFieldError(f"its {suffix} is not UTF-8 (byte {error.start})") from error
