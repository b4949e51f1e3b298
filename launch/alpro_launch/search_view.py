"""What a search found, for a terminal, for a page, and as plain values."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alpro_stream.errors import AlproError
from alpro_stream.evaluate.index_clips import IndexClips
from alpro_stream.evaluate.search import MAX_QUERY_CHARS, Hit, Searcher
from alpro_stream.pages import SearchFrame, SearchHit, SearchPage

Frames = Callable[[int], tuple[SearchFrame, ...]]
"""From the number of a row to the frames of its clip."""

_SHOWN_CAPTION = 100


def hit_lines(hits: Sequence[Hit]) -> Iterator[str]:
    """A table: place, scores, key, caption, source."""
    has_match = any(hit.match is not None for hit in hits)
    for rank, hit in enumerate(hits, start=1):
        match = "" if not has_match else "       - " if hit.match is None else f"{100 * hit.match:7.2f} %"
        caption = " ".join(" ".join(hit.row.captions[:1]).split())
        caption = caption if len(caption) <= _SHOWN_CAPTION else caption[: _SHOWN_CAPTION - 1] + "\u2026"
        media = f" ({hit.row.media})" if hit.row.media else ""
        yield f"{rank:3d} {match} {hit.similarity:6.3f}  {hit.row.key}  {caption}  [{hit.row.source}]{media}"


def hit_values(rank: int, hit: Hit, frames: Frames) -> dict[str, Any]:
    """A hit as JSON has it; `frames` gives addresses."""
    shown, note = frames_or_reason(hit, frames)
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
        "frames": [{"address": frame.picture, "time_s": frame.time_s} for frame in shown],
        "note": note,
    }


def search_page(
    searcher: Searcher, query: str, hits: Sequence[Hit], frames: Frames, *, error: str = "", is_served: bool = False
) -> SearchPage:
    """A page of results.

    Args:
        searcher: that found them.
        query: what was asked for; empty where nothing was yet.
        hits: best first.
        frames: gives those of a row of the index.
        error: why there are no hits.
        is_served: whether it has a search box.
    """
    index = searcher.index
    about = f"Searched in {index.directory}, by weights {index.description.weights_sha256[:12]}."
    return SearchPage(
        query=query[:MAX_QUERY_CHARS],
        hits=tuple(_shown(rank, hit, frames) for rank, hit in enumerate(hits, start=1)),
        num_clips=len(index),
        about=about,
        error=error,
        is_served=is_served,
        max_query_chars=MAX_QUERY_CHARS,
    )


def embedded_frames(clips: IndexClips, number: int) -> tuple[SearchFrame, ...]:
    """The pictures of a clip themselves."""
    return tuple(SearchFrame(picture=jpeg, time_s=time_s) for jpeg, time_s in clips.pictures(number))


def served_frames(clips: IndexClips, number: int) -> tuple[SearchFrame, ...]:
    """The addresses of the pictures of a clip: its number in the index, and theirs in the clip."""
    times = clips.picture_times(number)
    return tuple(
        SearchFrame(picture=f"/clip/{number}/{frame}.jpg", time_s=time_s) for frame, time_s in enumerate(times)
    )


def _shown(rank: int, hit: Hit, frames: Frames) -> SearchHit:
    pictures, note = frames_or_reason(hit, frames)
    return SearchHit(
        rank=rank,
        key=hit.row.key,
        captions=hit.row.captions,
        source=hit.row.source,
        media=hit.row.media,
        similarity=hit.similarity,
        match=hit.match,
        frames=pictures,
        note=note,
    )


def frames_or_reason(hit: Hit, frames: Frames) -> tuple[tuple[SearchFrame, ...], str]:
    """The frames of a hit, or why there are none: what was found is worth showing without them too."""
    try:
        return frames(hit.number), ""
    except AlproError as error:
        return (), f"no pictures: {error}"
