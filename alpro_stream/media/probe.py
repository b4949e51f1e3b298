"""What is noted of a source: size, codec, duration and number of frames."""

from dataclasses import dataclass
from typing import Any

from alpro_stream.errors import UnreadableError


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Size and codec of a source, and what was found in the clip taken from it.

    Attributes:
        width: pixels as displayed, a rotation in the metadata applied.
        height: pixels as displayed.
        codec: FFmpeg's name of the video codec (``h264``, ``av1``), or Pillow's name of the image format.
        duration_s: how long the clip is shown; None of an image.
        num_frames: frames of the clip in the source.
    """

    width: int
    height: int
    codec: str
    duration_s: float | None
    num_frames: int


def displayed_format(stream: Any, rotation: int) -> tuple[int, int, str]:
    """Width, height and codec name of a stream, once a frame told the rotation of the video, in degrees.

    Raises:
        UnreadableError: the header states no size.
    """
    context = stream.codec_context
    width, height, codec = context.width, context.height, context.codec.canonical_name
    if not width or not height:
        raise UnreadableError("the video stream states no width and height")
    return (width, height, codec) if rotation % 180 == 0 else (height, width, codec)
