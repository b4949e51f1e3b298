"""What a search found, for a terminal, for a page, and as plain values."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from alpro_stream.errors import AlproError
from alpro_stream.evaluate.index_clips import IndexClips
from alpro_stream.evaluate.search import MAX_QUERY_CHARS, Hit, Searcher
from alpro_stream.pages import SearchFrame, SearchHit, SearchPage

_SHOWN_CAPTION = 100


class Look(NamedTuple):
    """What is seen of a hit: frames of its clip, the clip to be played, or why there is neither."""

    frames: tuple[SearchFrame, ...]
    clip: bytes = b""
    note: str = ""


LookUp = Callable[[int], Look]
"""From the number of a row to what is seen of it."""


def hit_lines(hits: Sequence[Hit]) -> Iterator[str]:
    """A table: place, scores, key, caption, source."""
    has_match = any(hit.match is not None for hit in hits)
    for rank, hit in enumerate(hits, start=1):
        match = "" if not has_match else "       - " if hit.match is None else f"{100 * hit.match:7.2f} %"
        caption = " ".join(" ".join(hit.row.captions[:1]).split())
        caption = caption if len(caption) <= _SHOWN_CAPTION else caption[: _SHOWN_CAPTION - 1] + "\u2026"
        media = f" ({hit.row.media})" if hit.row.media else ""
        yield f"{rank:3d} {match} {hit.similarity:6.3f}  {hit.row.key}  {caption}  [{hit.row.source}]{media}"


def hit_values(rank: int, hit: Hit, look_up: LookUp) -> dict[str, Any]:
    """A hit as JSON has it; `look_up` gives addresses."""
    look = look_or_reason(hit, look_up)
    return {
        "rank": rank,
        "number": hit.number,
        "similarity": hit.similarity,
        "match": hit.match,
        "key": hit.row.key,
        "captions": list(hit.row.captions),
        "source": hit.row.source,
        "shard": hit.row.shard,
        "slot": hit.row.slot,
        "media": hit.row.media,
        "frames": [{"address": frame.picture, "time_s": frame.time_s} for frame in look.frames],
        "note": look.note,
    }


def search_page(
    searcher: Searcher, query: str, hits: Sequence[Hit], look_up: LookUp, *, error: str = "", is_served: bool = False
) -> SearchPage:
    """A page of results.

    Args:
        searcher: that found them.
        query: what was asked for; empty where nothing was yet.
        hits: best first.
        look_up: gives what is seen of a row of the index.
        error: why there are no hits.
        is_served: whether it has a search box.
    """
    index = searcher.index
    about = f"Searched in {index.directory}, by weights {index.description.weights_sha256[:12]}."
    return SearchPage(
        query=query[:MAX_QUERY_CHARS],
        hits=tuple(_shown(rank, hit, look_up) for rank, hit in enumerate(hits, start=1)),
        num_clips=len(index),
        about=about,
        error=error,
        is_served=is_served,
        max_query_chars=MAX_QUERY_CHARS,
    )


def embedded(clips: IndexClips, number: int) -> Look:
    """A clip itself with its first picture; of an image the picture."""
    first = clips.pictures(number)[0]
    return Look((SearchFrame(picture=first.jpeg, time_s=first.time_s),), clips.film(number))


def served(clips: IndexClips, number: int) -> Look:
    """The addresses of the pictures of a clip: its number in the index, and theirs in the clip."""
    times = clips.picture_times(number)
    return Look(
        tuple(SearchFrame(picture=f"/clip/{number}/{frame}.jpg", time_s=time_s) for frame, time_s in enumerate(times))
    )


def _shown(rank: int, hit: Hit, look_up: LookUp) -> SearchHit:
    look = look_or_reason(hit, look_up)
    return SearchHit(
        rank=rank,
        key=hit.row.key,
        captions=hit.row.captions,
        source=hit.row.source,
        media=hit.row.media,
        similarity=hit.similarity,
        match=hit.match,
        frames=look.frames,
        clip=look.clip,
        note=look.note,
    )


def look_or_reason(hit: Hit, look_up: LookUp) -> Look:
    """What is seen of a hit, or why that is nothing: what was found is worth showing without it too."""
    try:
        return look_up(hit.number)
    except AlproError as error:
        return Look((), note=f"no pictures: {error}")
