"""The frames of a video clip that are stored: one pass of decoding, the frame on display at each grid point.

Colours: swscale converts by the matrix and range that the file states, as players do; what a file leaves open is read
as swscale's default (BT.601, limited range). HDR transfer curves are not tone-mapped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation

from alpro_stream.errors import MediaError
from alpro_stream.media.container import explain, open_video
from alpro_stream.media.grid import Thinning, grid_rate, is_on_grid
from alpro_stream.media.probe import SourceInfo, stream_format

# Bicubic: swscale widens its kernel when it shrinks, so it does not alias, and it keeps edges that area averaging
# blurs; it is also what the ffmpeg command and the published preprocessing use. The flags make it the same on every
# CPU and give chroma its full resolution.
_SCALING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
# Seeking pays only when it saves more decoding than opening and checking cost.
_MIN_SEEK_S = Fraction(5)


@dataclass(frozen=True, slots=True)
class SparseFrames:
    """The stored frames of a clip.

    Attributes:
        frames: uint8 RGB arrays of shape [size, size, 3], in order of display.
        timestamps_s: when each is first displayed, in seconds after the file's first frame.
        source: size and codec of the file, duration and number of frames of the clip (measured).
    """

    frames: tuple[npt.NDArray[np.uint8], ...]
    timestamps_s: tuple[float, ...]
    source: SourceInfo


class _Shown(NamedTuple):
    """A decoded frame and the time it is displayed, in seconds after the file's first frame."""

    frame: Any
    shown_from: Fraction
    shown_until: Fraction


def sparse_frames(
    path: str | Path,
    *,
    fps: float = 3.0,
    max_frames: int = 64,
    size: int = 256,
    start_s: float | None = None,
    end_s: float | None = None,
) -> SparseFrames:
    """Decodes a clip once and keeps the frames displayed at its start and every ``1 / fps`` seconds after it.

    A frame displayed at several of these times is kept once. When there are more than `max_frames`, that many are
    kept, spread over the whole clip. Each is resized to a square whatever the aspect ratio, a rotation in the
    metadata applied.

    Args:
        path: a regular file in a common container.
        fps: rate of the grid.
        max_frames: most frames to keep.
        size: side of the frames in pixels.
        start_s: start of the clip, counted from the file's first frame; None for the first frame.
        end_s: end of the clip (exclusive); None for the end of the file.

    Raises:
        MediaError: no video, no frame, or decoding failed part-way (the message says after how many frames).
    """
    clip_start = Fraction(start_s or 0)
    clip_end = None if end_s is None else Fraction(end_s)
    rate = grid_rate(fps)
    kept: Thinning[tuple[npt.NDArray[np.uint8], float]] = Thinning(max_frames)
    num_frames, last_shown, rotation = 0, Fraction(0), 0
    with open_video(Path(path)) as (container, stream):
        width, height, codec = stream_format(stream)
        for shown in _shown_frames(container, stream, clip_start):
            last_shown = shown.shown_until if clip_end is None else min(shown.shown_until, clip_end)
            if clip_end is not None and shown.shown_from >= clip_end:
                break
            if last_shown <= clip_start:
                continue
            num_frames += 1
            rotation = shown.frame.rotation
            if is_on_grid(shown.shown_from - clip_start, last_shown - clip_start, rate):
                if kept.wants_next():
                    kept.add((_square(shown.frame, size), round(float(shown.shown_from), 6)))
                else:
                    kept.skip()
    stored = kept.result()
    if not stored:
        raise MediaError(_no_frame_reason(clip_start, last_shown))
    if rotation % 180 != 0:
        width, height = height, width
    duration_s = round(float(last_shown - clip_start), 6)
    return SparseFrames(
        frames=tuple(frame for frame, _ in stored),
        timestamps_s=tuple(timestamp for _, timestamp in stored),
        source=SourceInfo(width, height, codec, duration_s, num_frames),
    )


def _shown_frames(container: Any, stream: Any, clip_start: Fraction) -> Iterator[_Shown]:
    """Frames with the time each is displayed; those well before the clip are skipped where the file can seek."""
    decoded = _decode(container, stream)
    first = next(decoded, None)
    if first is None:
        return
    origin = first[1]
    if clip_start >= _MIN_SEEK_S:
        first, decoded = _seek(container, stream, first, origin + clip_start)
    previous, gap = first, Fraction(0)
    for current in decoded:
        # A frame that is not later than the one before is never displayed.
        if current[1] > previous[1]:
            gap = current[1] - previous[1]
            yield _Shown(previous[0], previous[1] - origin, current[1] - origin)
            previous = current
    # The last frame is displayed for its own duration, or for as long as the one before it.
    duration = (previous[0].duration or 0) * stream.time_base or gap or Fraction(1, 25)
    yield _Shown(previous[0], previous[1] - origin, previous[1] - origin + duration)


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


def _square(frame: Any, size: int) -> npt.NDArray[np.uint8]:
    """The frame as RGB of shape [size, size, 3], upright.

    Raises:
        MediaError: swscale does not know the pixel format.
    """
    try:
        small = frame.reformat(width=size, height=size, format="rgb24", interpolation=_SCALING, threads=1)
        pixels = small.to_ndarray()
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(f"a {frame.format.name} frame cannot be converted to RGB: {explain(error)}") from error
    # Squaring and turning commute, so the turn is done on the small picture.
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))


def _no_frame_reason(clip_start: Fraction, last_shown: Fraction) -> str:
    if last_shown == 0:
        return "the video stream holds no frame"
    return f"no frame after the clip's start at {float(clip_start):g} s: the video ends at {float(last_shown):g} s"
