"""The frames of a video clip that are stored: those on display at each point of a grid of times.

Where the container states the time of every frame, only what is needed is decoded: frames that are neither stored nor
referred to by others are skipped, and nothing is decoded after the last stored one. The stored frames are the same as
those of decoding everything, which is done wherever the quicker way meets anything unusual. Damage in what nobody
uses is not seen.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, TypeVar

import av
import numpy as np
import numpy.typing as npt

from alpro_stream.media.container import open_video
from alpro_stream.media.decode import Clip, shown_frames
from alpro_stream.media.grid import Thinning, as_written, is_on_grid, thinned
from alpro_stream.media.options import FrameConfig, Sampling
from alpro_stream.media.probe import SourceInfo, displayed_format
from alpro_stream.media.scaler import Scaler
from alpro_stream.media.timeline import Moment, Timeline, read_timeline

# Codecs whose frames say that no other frame refers to them. Not HEVC, whose frames say it of their own temporal layer
# only, while others may refer to them.
_SAYS_UNREFERENCED = ("h264", "mpeg4", "mpeg2video", "mpeg1video")


T = TypeVar("T")

Choose = Callable[[int], Sequence[int]]
"""From the number of frames that would be stored, at least one, to the indices of those wanted: ascending, some may
repeat."""


@dataclass(frozen=True, slots=True)
class SparseFrames:
    """The stored frames of a clip.

    Attributes:
        frames: uint8 RGB arrays of shape [height, width, 3], in order of display.
        timestamps_s: when each is first displayed, in seconds after the file's first frame.
        source: size and codec of the file, duration and number of frames of the clip (measured).
        sampling: how the frames were chosen in the end.
    """

    frames: tuple[npt.NDArray[np.uint8], ...]
    timestamps_s: tuple[float, ...]
    source: SourceInfo
    sampling: Sampling


def sparse_frames(
    file: BinaryIO,
    options: FrameConfig,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    choose: Choose | None = None,
) -> SparseFrames:
    """The frames displayed at a clip's start and every ``1 / fps`` seconds after it.

    A frame displayed at several of these times is kept once. When there are more than `max_frames`, that many are
    kept, spread over the whole clip. Each is resized, upright, with the colours that the file means; HDR is
    tone-mapped.

    With `keyframes` the clip is treated as if it had key frames only, each displayed until the next one.

    Args:
        file: open for reading and seekable; a video in a common container.
        options: which frames, and their size.
        start_s: start of the clip, counted from the file's first frame; None for the first frame.
        end_s: end of the clip (exclusive); None for the end of the file.
        choose: which of these frames are wanted, so that no more need be decoded; None for all.

    Raises:
        UnreadableError: no video, or frames of more than `max_pixels`.
        MediaError: no frame, or decoding failed part-way (the message says after how many frames).
    """
    clip = Clip.of(start_s, end_s)
    timeline = read_timeline(file, clip, options.max_pixels)
    if timeline is not None:
        if options.sampling == "keyframes":
            keys = _key_moments(timeline)
            if len(keys) >= min(options.min_frames, len(timeline.ticks)):
                found = _decode_some(file, options, clip, timeline, keys, "keyframes", choose)
                if found is not None:
                    return found
        found = _decode_some(file, options, clip, timeline, timeline.moments(), "exact", choose)
        if found is not None:
            return found
    return _decode_all(file, options, clip, choose)


def locate_frames(file: BinaryIO, options: FrameConfig, choose: Choose) -> tuple[list[int], int] | None:
    """Where the frames that `sparse_frames` would give lie in the file, for another decoder to make them.

    Args:
        file: as there; the whole of it is the clip.
        options: as there.
        choose: as there.

    Returns:
        Numbers of the frames in order of display, and how many there are; None where only decoding can tell.

    Raises:
        UnreadableError: as there.
    """
    timeline = read_timeline(file, Clip.of(None, None), options.max_pixels)
    if timeline is None or options.sampling == "keyframes":
        return None
    numbers = {ticks: number for number, ticks in enumerate(timeline.ticks)}
    return [numbers[moment.ticks] for moment in _chosen(timeline.moments(), options, choose)], len(numbers)


def _key_moments(timeline: Timeline) -> list[Moment]:
    """The key frames of a clip, each displayed until the next one."""
    keys = [moment for moment in timeline.moments() if moment.is_key]
    ends = [*(key.shown_from for key in keys), timeline.duration_s][1:]
    return [key._replace(shown_until=end) for key, end in zip(keys, ends, strict=False)]


def _chosen(moments: Iterable[Moment], options: FrameConfig, choose: Choose | None = None) -> list[Moment]:
    """The frames to store, or those wanted of them."""
    rate = as_written(options.fps)
    on_grid = [moment for moment in moments if is_on_grid(moment.shown_from, moment.shown_until, rate)]
    return _wanted([on_grid[index] for index in thinned(len(on_grid), options.max_frames)], choose)


def _wanted(stored: list[T], choose: Choose | None) -> list[T]:
    return stored if choose is None or not stored else [stored[index] for index in choose(len(stored))]


def _decode_some(
    file: BinaryIO,
    options: FrameConfig,
    clip: Clip,
    timeline: Timeline,
    candidates: Iterable[Moment],
    sampling: Sampling,
    choose: Choose | None = None,
) -> SparseFrames | None:
    """Stores the frames chosen from the candidates; None when one of them does not decode as the container says."""
    wanted = _chosen(candidates, options, choose)
    chosen = {moment.ticks for moment in wanted}
    if not chosen:
        return None
    stored: dict[int, npt.NDArray[np.uint8]] = {}
    with open_video(file, options.max_pixels) as (container, stream):
        context = stream.codec_context
        skipping = "NONREF" if context.name in _SAYS_UNREFERENCED else "DEFAULT"
        scaler = Scaler(options.size, options.resize, stream.sample_aspect_ratio)
        try:
            if timeline.seek_to is not None:
                container.seek(timeline.seek_to, stream=stream, backward=True)
            for packet in container.demux(stream):
                is_wanted = packet.size == 0 or packet.pts in chosen  # an empty packet makes the decoder finish
                if not is_wanted and sampling == "keyframes":
                    continue
                context.skip_frame = "DEFAULT" if is_wanted else skipping
                for frame in packet.decode():
                    if frame.pts not in chosen:
                        continue
                    if stored and frame.pts <= next(reversed(stored)):
                        return None
                    stored[frame.pts] = scaler.pixels(frame)
                    rotation = frame.rotation
                if len(stored) == len(chosen):
                    break
        except (av.FFmpegError, OSError):
            return None
        if len(stored) < len(chosen):
            return None
        width, height, codec = displayed_format(stream, rotation)
    return SparseFrames(
        frames=tuple(stored[moment.ticks] for moment in wanted),
        timestamps_s=tuple(_seconds(moment.shown_from, clip) for moment in wanted),
        source=SourceInfo(width, height, codec, round(float(timeline.duration_s), 6), len(timeline.ticks)),
        sampling=sampling,
    )


def _decode_all(file: BinaryIO, options: FrameConfig, clip: Clip, choose: Choose | None = None) -> SparseFrames:
    """Stores the frames chosen while every frame is decoded; their number is not known beforehand."""
    rate = as_written(options.fps)
    kept: Thinning[tuple[npt.NDArray[np.uint8], float]] = Thinning(options.max_frames)
    num_frames = 0
    shown: Any = None
    with open_video(file, options.max_pixels) as (container, stream):
        scaler = Scaler(options.size, options.resize, stream.sample_aspect_ratio)
        for shown in shown_frames(container, stream, clip):
            num_frames += 1
            if is_on_grid(shown.shown_from, shown.shown_until, rate):
                if kept.wants_next():
                    kept.add((scaler.pixels(shown.frame), _seconds(shown.shown_from, clip)))
                else:
                    kept.skip()
        width, height, codec = displayed_format(stream, shown.frame.rotation)
    stored = _wanted(kept.result(), choose)
    return SparseFrames(
        frames=tuple(pixels for pixels, _ in stored),
        timestamps_s=tuple(seconds for _, seconds in stored),
        source=SourceInfo(width, height, codec, round(float(shown.shown_until), 6), num_frames),
        sampling="exact",
    )


def _seconds(shown_from: Fraction, clip: Clip) -> float:
    """Seconds after the file's first frame."""
    return round(float(shown_from + clip.start), 6)
