"""Decoding every frame of a clip in order, with the time each is displayed."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av

from alpro_stream.errors import MediaError
from alpro_stream.media.container import explain
from alpro_stream.media.grid import as_written

# Seeking pays only when it saves more decoding than opening and checking cost.
MIN_SEEK_S = Fraction(5)


class Clip(NamedTuple):
    """A part of a video, in seconds after the video's first frame; without an end it lasts as long as the video."""

    start: Fraction
    end: Fraction | None

    @classmethod
    def of(cls, start_s: float | None, end_s: float | None) -> "Clip":
        """From seconds; None for the video's start or end.

        Raises:
            MediaError: an end that is not after the start.
        """
        start, end = as_written(start_s or 0), None if end_s is None else as_written(end_s)
        if end is not None and end <= start:
            raise MediaError(f"the clip ends at {end_s:g} s and starts at {float(start):g} s; the end must be later")
        return cls(start, end)


class Shown(NamedTuple):
    """A decoded frame and the time it is displayed, in seconds after the clip's start.

    A frame on display when the clip starts has a negative `shown_from`.
    """

    frame: Any
    shown_from: Fraction
    shown_until: Fraction


def shown_frames(container: Any, stream: Any, clip: Clip) -> Iterator[Shown]:
    """The frames displayed during a clip, in order; what lies well before it is skipped where the file can seek.

    Raises:
        MediaError: no such frame, or decoding failed part-way (the message says after how many frames).
    """
    shown_until: Fraction | None = None
    for frame, since, until in _displayed(container, stream, clip.start):
        shown_until = until
        if clip.end is not None and since >= clip.end:
            break
        until = until if clip.end is None else min(until, clip.end)
        if until > clip.start:
            yield Shown(frame, since - clip.start, until - clip.start)
    if shown_until is None:
        raise MediaError("the video stream holds no frame")
    if shown_until <= clip.start:
        raise MediaError(
            f"no frame after the clip's start at {float(clip.start):g} s: the video ends at {float(shown_until):g} s"
        )


def first_ticks(container: Any, stream: Any) -> int | None:
    """Time of the first frame that decodes, in the stream's ticks; None when it has none or says none."""
    frame = next(container.decode(stream), None)
    return None if frame is None else frame.pts


def _displayed(container: Any, stream: Any, clip_start: Fraction) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Frames with the times each is displayed from and until, in seconds after the file's first frame."""
    decoded = _decode(container, stream)
    first = next(decoded, None)
    if first is None:
        return
    origin = first[1]
    if clip_start >= MIN_SEEK_S:
        first, decoded = _seek(container, stream, first, origin + clip_start)
    previous, gap = first, Fraction(0)
    for current in decoded:
        # A frame that is not later than the one before is never displayed.
        if current[1] > previous[1]:
            gap = current[1] - previous[1]
            yield previous[0], previous[1] - origin, current[1] - origin
            previous = current
    since = previous[1] - origin
    yield previous[0], since, since + last_duration_s((previous[0].duration or 0) * stream.time_base, gap)


def last_duration_s(stated: Fraction, gap: Fraction) -> Fraction:
    """How long the last frame is displayed: for its own duration, or for as long as the one before it."""
    return stated or gap or Fraction(1, 25)


def _seek(container: Any, stream: Any, first: Any, target: Fraction) -> tuple[Any, Iterator[Any]]:
    """Goes to the key frame before `target`; back to the beginning when the file's index was wrong about it."""
    try:
        container.seek(int(target / stream.time_base), stream=stream, backward=True)
        decoded = _decode(container, stream)
        landed = next(decoded, None)
        if landed is not None and first[1] <= landed[1] <= target:
            return landed, decoded
        container.seek(0, backward=True)
        decoded = _decode(container, stream)
        return next(decoded, first), decoded
    except av.FFmpegError as error:
        raise MediaError(f"seeking to the clip's start failed: {explain(error)}") from error


def _decode(container: Any, stream: Any) -> Iterator[tuple[Any, Fraction]]:
    """Decoded frames with their times in seconds on the file's own clock."""
    num_decoded, time = 0, Fraction(0)
    try:
        for frame in container.decode(stream):
            ticks = frame.pts if frame.pts is not None else frame.dts
            if ticks is not None:
                time = ticks * stream.time_base
            elif num_decoded:  # no time stamp at all: as the stream's average rate has it
                time += 1 / Fraction(stream.average_rate or 25)
            yield frame, time
            num_decoded += 1
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"decoding failed after {num_decoded} frames: {explain(error)}") from error
