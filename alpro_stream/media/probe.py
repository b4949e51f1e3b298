"""What a video says about itself, read from its header without decoding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from alpro_stream.media.container import UnreadableError, open_video


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Size and codec of a source, and what was found in the clip taken from it.

    Attributes:
        width: pixels as displayed, a rotation in the metadata applied.
        height: pixels as displayed.
        codec: FFmpeg's name of the video codec, or Pillow's name of the image format.
        duration_s: how long the clip is shown; None when nothing says so.
        num_frames: frames of the clip in the source; 0 when nothing says so.
    """

    width: int
    height: int
    codec: str
    duration_s: float | None
    num_frames: int


def probe_video(path: str | Path) -> SourceInfo:
    """Reads size, codec, stated duration and stated number of frames from the header.

    The statements may be wrong or absent; `sparse_frames` returns measured ones. A rotation is known only once a
    frame is decoded, so the size here is the coded one.

    Raises:
        UnreadableError: the file is no video that can be opened.
    """
    with open_video(Path(path)) as (container, stream):
        width, height, codec = stream_format(stream)
        return SourceInfo(width, height, codec, _stated_duration_s(container, stream), stream.frames)


def stream_format(stream: Any) -> tuple[int, int, str]:
    """Coded width, height and codec name of a stream.

    Raises:
        UnreadableError: the header states no size.
    """
    context = stream.codec_context
    if not context.width or not context.height:
        raise UnreadableError("the video stream states no width and height")
    return context.width, context.height, context.name


def _stated_duration_s(container: Any, stream: Any) -> float | None:
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration is not None else None
