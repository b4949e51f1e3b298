"""Which stored videos NVDEC may decode, those whose frames DALI makes as PyAV does, and which of their frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, locate_frames
from alpro_stream.media.container import open_video
from alpro_stream.media.size import scaled_size

_CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
_FORMAT = "yuv420p"
_MATRICES_601 = (5, 6)
_UNSTATED_MATRICES = (0, 2, 3)
_HDR_TRANSFERS = (16, 18)
_LIMITED_RANGES = (0, 1)
_MOST_SD_LINES, _MOST_SD_COLUMNS = 576, 1024
# The largest of the codecs' least sides (HEVC), and what all generations of NVDEC take.
_MIN_SIDE, _MAX_SIDE = 144, 4096


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a container and a first decoded frame say of a video; numbers are those of ITU-T H.273.

    Attributes:
        codec: FFmpeg's name of the format, whatever decodes it.
        width: of the coded frames, in pixels, before they are turned.
        height: of the coded frames, in pixels.
        pixel_format: FFmpeg's name.
        matrix: of the colours.
        transfer: curve of the colours.
        colour_range: FFmpeg's number: 0 unstated, 1 limited, 2 full.
        rotation: degrees to turn frames by for display.
        is_interlaced: whether a frame holds two moments.
        num_packets: of the video in the file, with those that are never displayed.
        num_frames: that are displayed.
    """

    codec: str
    width: int
    height: int
    pixel_format: str
    matrix: int
    transfer: int
    colour_range: int
    rotation: float
    is_interlaced: bool
    num_packets: int
    num_frames: int


@dataclass(frozen=True, slots=True)
class LocatedVideo:
    """Where the wanted frames of a stored video are.

    Attributes:
        facts: what the file says of itself.
        frames: their numbers in order of display; they may repeat.
        width: of the frames as they would be stored, in pixels.
        height: of the frames as they would be stored, in pixels.
    """

    facts: VideoFacts
    frames: tuple[int, ...]
    width: int
    height: int


def nvdec_refusal(facts: VideoFacts) -> str | None:
    """Why NVDEC through DALI (2.4) is not to decode a video; None when it may.

    DALI converts 8-bit 4:2:0 by the matrix of BT.601 whatever the file states, turns nothing, and counts packets where
    displayed frames are meant. Careful where it is not known what it does.
    """
    if facts.codec not in _CODECS:
        return f"codec {facts.codec}; NVDEC gets {', '.join(_CODECS)}"
    if facts.pixel_format != _FORMAT:
        return f"pixel format {facts.pixel_format}; NVDEC gets {_FORMAT} only"
    if facts.colour_range not in _LIMITED_RANGES:
        return "full-range colours; NVDEC gets limited range only"
    if facts.transfer in _HDR_TRANSFERS:
        return "HDR, which must be tone-mapped"
    is_hd = facts.height > _MOST_SD_LINES or facts.width > _MOST_SD_COLUMNS
    if facts.matrix not in _MATRICES_601 and not (facts.matrix in _UNSTATED_MATRICES and not is_hd):
        return f"colours that are not those of BT.601 (matrix {facts.matrix}, {facts.width} x {facts.height} pixels)"
    if round(facts.rotation) % 360:
        return f"a rotation by {facts.rotation:g} degrees"
    if facts.is_interlaced:
        return "interlaced frames"
    if facts.width % 2 or facts.height % 2:
        return f"an odd size, {facts.width} x {facts.height} pixels"
    if not (min(facts.width, facts.height) >= _MIN_SIDE and max(facts.width, facts.height) <= _MAX_SIDE):
        return f"{facts.width} x {facts.height} pixels; NVDEC gets sides of {_MIN_SIDE} to {_MAX_SIDE}"
    if facts.num_packets != facts.num_frames:
        return f"{facts.num_packets} packets for {facts.num_frames} displayed frames, so frames cannot be counted"
    return None


def locate_video(file: BinaryIO, stored: FrameConfig, choose: Callable[[int], Sequence[int]]) -> LocatedVideo:
    """Finds the wanted frames of a video by their times; decodes no more than the first frame.

    Args:
        file: open for reading and seekable.
        stored: the frames that a data set would hold, and their size.
        choose: which of them are wanted, see `alpro_stream.media.sparse_frames`.

    Raises:
        MediaError: no video, or one whose frames cannot be counted without decoding them.
    """
    located = locate_frames(file, stored, choose)
    if located is None:
        raise MediaError("its container does not tell when its frames are displayed")
    numbers, num_frames = located
    first, num_packets = None, 0
    with open_video(file, stored.max_pixels) as (container, stream):
        for packet in container.demux(stream):
            num_packets += packet.size > 0
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise MediaError("it decodes to no frame")
        width, height = scaled_size(first.width, first.height, stored.size, stored.resize, stream.sample_aspect_ratio)
        return LocatedVideo(facts_of(stream, first, num_packets, num_frames), tuple(numbers), width, height)


def facts_of(stream: Any, frame: Any, num_packets: int, num_frames: int) -> VideoFacts:
    """The facts of a video that PyAV has open.

    Args:
        stream: `av.VideoStream`.
        frame: its first decoded `av.VideoFrame`.
        num_packets: of the stream that hold data.
        num_frames: that are displayed.
    """
    return VideoFacts(
        codec=stream.codec_context.codec.canonical_name,
        width=frame.width,
        height=frame.height,
        pixel_format=frame.format.name,
        matrix=int(frame.colorspace),
        transfer=int(frame.color_trc),
        colour_range=int(frame.color_range),
        rotation=float(frame.rotation),
        is_interlaced=frame.interlaced_frame,
        num_packets=num_packets,
        num_frames=num_frames,
    )
