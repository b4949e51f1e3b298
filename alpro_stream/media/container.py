"""Opening a video file that nobody vouches for.

FFmpeg gets the bytes of one open file and may open nothing else. Without that, a text file named ``clip.mp4`` that
holds a playlist (``ffconcat``, m3u8) makes FFmpeg open the files or addresses it lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
import av.logging

from alpro_stream.errors import UnreadableError
from alpro_stream.media.size import refuse_pixels

# Demuxers of real containers, by FFmpeg's names. Not here: playlists, image sequences, raw streams, devices.
CONTAINER_FORMATS = (
    "mov",
    "mp4",
    "matroska",
    "webm",
    "avi",
    "mpegts",
    "mpeg",
    "flv",
    "ogg",
    "asf",
    "ivf",
    "mxf",
    "gif",
)
_OPEN_OPTIONS = {
    "format_whitelist": ",".join(CONTAINER_FORMATS),
    # No protocol has this name: the bytes come from us, so FFmpeg needs to open nothing by name, not even a file.
    "protocol_whitelist": "none",
}
_READ_BUFFER_BYTES = 1 << 20

# FFmpeg's own lines name no file and would flood the log; every failure reaches the caller as an exception.
av.logging.set_level(av.logging.PANIC)


@contextmanager
def open_video(file: BinaryIO, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Reads a video from the beginning of an open, seekable file.

    Gives ``(container, its first video stream)``, set to single-threaded decoding: one task a core keeps every core
    busy without threads, and damaged files then decode to the same frames every time. Cover pictures of audio files
    are no video streams.

    Args:
        file: stays open.
        max_pixels: most pixels of a frame; a decoder that meets far more in the middle of the file fails.

    Raises:
        UnreadableError: not a container on the list, no video stream, or more than `max_pixels`.
    """
    # Twice: decoders count what they pad, and frames within the limit must not fail for that.
    limit = {"max_pixels": str(2 * max_pixels)}
    file.seek(0)
    try:
        container = av.open(
            file, options=_OPEN_OPTIONS | limit, buffer_size=_READ_BUFFER_BYTES, metadata_errors="replace"
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UnreadableError(f"no video container that can be opened: {_explain_open(error)}") from error
    with container:
        stream = _first_video_stream(container)
        context = stream.codec_context
        refuse_pixels("video", context.width, context.height, max_pixels)
        context.options = limit
        context.thread_count = 1
        yield container, stream


def explain(error: BaseException) -> str:
    """FFmpeg's words for an error, without its number and the name of the call."""
    return str(getattr(error, "strerror", None) or error)


def _explain_open(error: Exception) -> str:
    if isinstance(error, av.ArgumentError):  # what FFmpeg answers for a format that is not on the list
        return f"not one of the accepted formats ({', '.join(CONTAINER_FORMATS)})"
    return explain(error)


def _first_video_stream(container: Any) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise UnreadableError("the video stream uses a codec that this build of FFmpeg cannot decode")
            return stream
    raise UnreadableError(f"no video stream in this {container.format.long_name} file")
