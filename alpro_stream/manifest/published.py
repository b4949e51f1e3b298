"""The annotation files of published data sets, as their authors distribute them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpro_stream.errors import ManifestError
from alpro_stream.manifest.columns import Entry
from alpro_stream.manifest.lines import entries_of_lines, json_document, json_entries, text_lines
from alpro_stream.manifest.rows import RejectedRow, type_name

MSVD_MAPPING_FILE = "youtube_mapping.txt"

_MSRVTT_SPLITS = {"validate": "val"}


def cc3m_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """CC3M: ``caption<TAB>url`` without a header; quotes are part of the caption.

    Raises:
        ManifestError: the file cannot be read.
    """
    return entries_of_lines(path, _cc3m_entry)


def _cc3m_entry(line: int, text: str) -> Entry | RejectedRow:
    cells = text.rstrip("\r\n").split("\t")
    if len(cells) == 2:
        return Entry(line, {"caption": cells[0], "url": cells[1], "kind": "image"})
    return RejectedRow(line, None, f"{len(cells)} columns, expected a caption and an address with a tab between")


def msvd_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """MSVD: ``<name> <caption>``, one line a caption, comments with ``#``.

    Raises:
        ManifestError: the file cannot be read.
    """
    return entries_of_lines(path, _msvd_entry)


def _msvd_entry(line: int, text: str) -> Entry | None:
    if text.startswith("#"):
        return None
    name, _, caption = text.strip().partition(" ")
    return Entry(line, {"name": name, "caption": caption})


def msrvtt_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """MSRVTT: an object with the lists ``videos`` and ``sentences``; an entry a video, with all its sentences.

    Raises:
        ManifestError: the file cannot be read, is broken, or does not have the two lists.
    """
    document = json_document(path)
    lists = [document.get(name) if isinstance(document, dict) else None for name in ("videos", "sentences")]
    if not all(isinstance(values, list) for values in lists):
        found = sorted(document) if isinstance(document, dict) else type_name(document)
        raise ManifestError(f"{path} holds {found}; expected an object with the lists 'videos' and 'sentences'")
    videos, sentences = lists
    sentences_of: dict[Any, list[Any]] = {}
    number_of: dict[Any, int] = {}
    for number, sentence in enumerate(sentences or [], 1):
        video_id = _hashable(sentence, "video_id")
        if video_id is None:
            yield RejectedRow(number, None, f"sentence {number} names no 'video_id'")
            continue
        number_of.setdefault(video_id, number)
        sentences_of.setdefault(video_id, []).append(sentence.get("caption"))
    for number, video in enumerate(videos or [], 1):
        video_id = _hashable(video, "video_id")
        if video_id is None:
            yield RejectedRow(number, None, f"video {number} has no 'video_id'")
            continue
        split = video.get("split")
        captions = sentences_of.pop(video_id, [])
        yield Entry(number, {**video, "captions": captions, "split": _MSRVTT_SPLITS.get(str(split), split)})
    for video_id in sentences_of:
        number = number_of[video_id]
        yield RejectedRow(number, str(video_id), f"sentence {number} is of a video that the list does not have")


def didemo_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """DiDeMo: a list with one description of a moment an entry; all of a video make one paragraph, as published.

    Raises:
        ManifestError: the file cannot be read, is broken, or holds no list.
    """
    document = json_document(path)
    if not isinstance(document, list):
        raise ManifestError(f"{path} holds {type_name(document)}; expected a list of descriptions")
    paragraphs: dict[str, Entry] = {}
    for number, moment in enumerate(document, 1):
        video, description = _hashable(moment, "video"), moment.get("description") if isinstance(moment, dict) else None
        if video is None or not isinstance(description, str) or not description.strip():
            yield RejectedRow(number, None if video is None else str(video), "expected a 'video' and its 'description'")
        elif video in paragraphs:
            paragraphs[video].values["description"] += f" {description}"
        else:
            paragraphs[video] = Entry(number, dict(moment))
    yield from paragraphs.values()


def msvd_qa_entries(path: Path) -> Iterator[Entry | RejectedRow]:
    """MSVD-QA: questions about clips by number, with the names of the clips in ``youtube_mapping.txt`` beside them.

    Where that file is not there, the clips are named by their numbers, ``vid1`` and so on.

    Raises:
        ManifestError: one of the files cannot be read, or the list is broken.
    """
    mapping = path.with_name(MSVD_MAPPING_FILE)
    name_of = _msvd_names(mapping) if mapping.is_file() else None
    for entry in json_entries(path):
        number = entry.values.get("video_id") if isinstance(entry, Entry) else None
        if isinstance(entry, RejectedRow) or number is None:
            yield entry
        elif (name := f"vid{number}") in (name_of or (name,)):
            yield Entry(entry.line, {**entry.values, "name": name_of[name] if name_of else name})
        else:
            yield RejectedRow(entry.line, name, f"{MSVD_MAPPING_FILE} has no clip {name}")


def _msvd_names(mapping: Path) -> dict[str, str]:
    """Name of each clip by its number, of lines ``<name> vid<number>``."""
    lines = [item[1].split() for item in text_lines(mapping) if not isinstance(item, RejectedRow)]
    return {line[1]: line[0] for line in lines if len(line) == 2}


def _hashable(entry: Any, name: str) -> Any:
    """The text or number under a key of an entry; None when there is none."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None
