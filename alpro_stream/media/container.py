"""Opening a video file that nobody vouches for.

FFmpeg gets bytes of one regular file and may open nothing else. Without that, a text file named ``clip.mp4`` that
holds a playlist (``ffconcat``, m3u8) makes FFmpeg open the files or addresses it lists.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.logging

from alpro_stream.errors import MediaError

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


class UnreadableError(MediaError):
    """A file that is not the medium it should be, found before anything is decoded."""


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video file and gives ``(container, its first video stream)``, set to single-threaded decoding.

    One thread, because one task a core keeps every core busy without it, and because damaged files then decode to
    the same frames every time. Cover pictures of audio files are no video streams.

    Raises:
        UnreadableError: not a regular file, not a container on the list, or no video stream.
    """
    with open_regular_file(path) as file:
        try:
            container = av.open(file, options=_OPEN_OPTIONS, buffer_size=_READ_BUFFER_BYTES, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UnreadableError(f"no video container that can be opened: {_explain_open(error)}") from error
        with container:
            stream = _first_video_stream(container)
            stream.codec_context.thread_count = 1
            yield container, stream


@contextmanager
def open_regular_file(path: Path) -> Iterator[Any]:
    """Opens a file for reading; pipes, devices and folders are refused without waiting on them.

    Raises:
        UnreadableError: the file is missing, unreadable, empty or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UnreadableError(f"cannot open the file: {getattr(error, 'strerror', None) or error}") from error
    with os.fdopen(descriptor, "rb", closefd=True) if _is_regular(descriptor) else _refuse(descriptor) as file:
        if os.fstat(descriptor).st_size == 0:
            raise UnreadableError("the file is empty")
        yield file


def explain(error: BaseException) -> str:
    """FFmpeg's words for an error, without its number and the name of the call."""
    return str(getattr(error, "strerror", None) or error)


def _explain_open(error: Exception) -> str:
    if isinstance(error, av.ArgumentError):  # what FFmpeg answers for a format that is not on the list
        return f"not one of the accepted formats ({', '.join(CONTAINER_FORMATS)})"
    return explain(error)


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _refuse(descriptor: int) -> Any:
    os.close(descriptor)
    raise UnreadableError("not a regular file")


def _first_video_stream(container: Any) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise UnreadableError("the video stream uses a codec that this build of FFmpeg cannot decode")
            return stream
    raise UnreadableError(f"no video stream in this {container.format.long_name} file")
