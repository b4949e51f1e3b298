"""When the frames of a clip are displayed, read from the container without decoding.

A packet of most codecs is one frame and states when it is displayed. Knowing all times beforehand tells which frames
are needed, and a decoder then skips much of the others.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple

import av

from alpro_stream.media.container import open_video
from alpro_stream.media.decode import MIN_SEEK_S, Clip, first_ticks, last_duration_s


class Moment(NamedTuple):
    """A frame that is not decoded yet.

    Attributes:
        ticks: its time stamp, in the stream's time base: its name when it is decoded.
        is_key: whether decoding can start at it.
        shown_from: in seconds after the clip's start; negative for a frame that is on display when the clip starts.
        shown_until: in seconds after the clip's start.
    """

    ticks: int
    is_key: bool
    shown_from: Fraction
    shown_until: Fraction


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames displayed during a clip; times are in ticks of the stream's time base.

    Attributes:
        ticks: time stamps of the frames in order of display; at least one.
        keys: time stamps of key frames.
        start: the clip's start.
        end: the clip's end, or the video's.
        time_base: seconds of a tick.
        seek_to: where decoding has to start, for `av`'s seek; None for the beginning of the file.
    """

    ticks: Sequence[int]
    keys: frozenset[int]
    start: Fraction
    end: Fraction
    time_base: Fraction
    seek_to: int | None

    @property
    def duration_s(self) -> Fraction:
        """How long frames are displayed."""
        return (self.end - self.start) * self.time_base

    def moments(self) -> Iterator[Moment]:
        """The frames one by one: a video of hours has a million."""
        ends: Iterator[int | Fraction] = chain(islice(self.ticks, 1, None), [self.end])
        for tick, until in zip(self.ticks, ends, strict=True):
            is_key = tick in self.keys
            yield Moment(tick, is_key, (tick - self.start) * self.time_base, (until - self.start) * self.time_base)


class _Packets(NamedTuple):
    """What the packets of a stream say.

    Attributes:
        first: time stamp of the first packet in the file's order.
        ticks: different time stamps in order of display.
        keys: those of key frames.
        last_duration: duration of the frame displayed last, in ticks; 0 when nothing says so.
    """

    first: int
    ticks: list[int]
    keys: frozenset[int]
    last_duration: int


def read_timeline(file: BinaryIO, clip: Clip, max_pixels: int) -> Timeline | None:
    """The frames displayed during a clip.

    None where the container does not tell: packets without a time or out of order, an error, or a first packet that
    decodes to nothing. The clip is then to be decoded in full, which also says what is wrong.

    Raises:
        UnreadableError: as `open_video`.
    """
    origin: int | None = None
    seek_to: int | None = None
    try:
        if clip != Clip.of(None, None):
            with open_video(file, max_pixels) as (container, stream):
                origin = first_ticks(container, stream)
                if origin is None:
                    return None
                if clip.start >= MIN_SEEK_S:
                    seek_to = origin + int(clip.start / stream.time_base)
        with open_video(file, max_pixels) as (container, stream):
            if seek_to is not None:
                container.seek(seek_to, stream=stream, backward=True)
            until = None if clip.end is None or origin is None else origin + clip.end / stream.time_base
            packets = _read_packets(container, stream, until)
            time_base = Fraction(stream.time_base)
    except (av.FFmpegError, OSError):
        return None
    if packets is None:
        return None
    if seek_to is not None:
        if packets.first not in packets.keys or packets.first > seek_to:
            return None
    elif origin is not None and packets.ticks[0] != origin:
        return None
    return _timeline(packets, packets.ticks[0] if origin is None else origin, time_base, clip, seek_to)


def _read_packets(container: Any, stream: Any, until: Fraction | None) -> _Packets | None:
    ticks: list[int] = []
    keys = set()
    decoded_at: int | None = None
    last, last_duration = -math.inf, 0
    codec = stream.codec_context.name
    for packet in container.demux(stream):
        # What an edit list cuts off is decoded and not displayed.
        if packet.size == 0 or packet.is_discard or _is_hidden(codec, packet):
            continue
        if packet.dts is not None:
            if decoded_at is not None and packet.dts < decoded_at:
                return None
            decoded_at = packet.dts
        if packet.pts is None:
            return None
        ticks.append(packet.pts)
        if packet.is_keyframe:
            keys.add(packet.pts)
        if packet.pts > last:  # of equal times the first is displayed
            last, last_duration = packet.pts, packet.duration or 0
        if until is not None and decoded_at is not None and decoded_at >= until:
            break  # nothing is displayed before it is decoded
    if not ticks:
        return None
    return _Packets(ticks[0], sorted(set(ticks)), frozenset(keys), last_duration)


def _is_hidden(codec: str, packet: Any) -> bool:
    """Whether a packet holds a frame that others refer to and that is never displayed, by its first bits."""
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0x10
    if codec != "vp9" or data[-1] & 0xE0 == 0xC0:  # a superframe: hidden frames together with a displayed one
        return False
    is_profile_3 = data[0] & 0x30 == 0x30  # has one more bit before those that say what is displayed
    return not data[0] & (0x05 if is_profile_3 else 0x0A)


def _timeline(packets: _Packets, origin: int, time_base: Fraction, clip: Clip, seek_to: int | None) -> Timeline | None:
    """The part of the packets' times that a clip displays; None when it begins after them."""
    ticks = packets.ticks
    gap = ticks[-1] - ticks[-2] if len(ticks) > 1 else 0
    start = origin + clip.start / time_base
    end = ticks[-1] + last_duration_s(packets.last_duration * time_base, gap * time_base) / time_base
    if end <= start:
        return None
    stop = len(ticks)
    if clip.end is not None:
        clip_end = origin + clip.end / time_base
        stop, end = bisect_left(ticks, clip_end), min(end, clip_end)
    # The clip begins with the frame that is on display when it starts.
    shown = ticks[max(bisect_right(ticks, start) - 1, 0) : stop]
    return Timeline(shown, packets.keys, start, end, time_base, seek_to)
