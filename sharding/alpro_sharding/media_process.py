"""The process that fetches and decodes: what happens in here may hang, crash or eat memory, and is killed for it.

Started by `media_pool` as a `KillableProcess` with two open files, the buffer for members and the lock of decoding.
"""

import errno
import fcntl
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from alpro_sharding.filters import refuse_frames, refuse_source
from alpro_sharding.media_messages import (
    Decoded,
    MediaFailure,
    MediaOptions,
    MediaRequest,
    MediaStage,
    encode_answer,
    encode_failure,
    encode_fatal,
    encode_stage,
)
from alpro_stream.errors import FetchError, MediaError, UnreadableError
from alpro_stream.media import digest_of, encode_jpeg, open_media, read_image, sparse_frames, stored_video
from alpro_stream.media.killable import connect, limit_memory, write_all
from alpro_stream.shards.sample import frame_extension

_COPY_BYTES = 1 << 20


class _FilteredError(MediaError):
    """A file that the filters leave out."""


def main(arguments: list[str]) -> None:
    """Answers requests until the connection ends."""
    connection, (buffer, lock) = connect(arguments)
    options = MediaOptions.model_validate_json(connection.recv_bytes())
    limit_memory(options.limits.memory_mb << 20)
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the worker ended
        while True:
            request = MediaRequest.from_bytes(connection.recv_bytes())
            connection.send_bytes(_answer(request, options, connection, buffer, lock))


def _answer(request: MediaRequest, options: MediaOptions, connection: Connection, buffer: int, lock: int) -> bytes:
    stage: MediaStage = "fetch"
    connection.send_bytes(encode_stage("fetch"))
    started = time.monotonic()
    try:
        with open_media(request.place, byte_range=request.byte_range, fetch=options.fetch) as file:
            sha256 = digest_of(file)
            fetch_s = time.monotonic() - started
            connection.send_bytes(encode_stage("wait"))
            # One decode at a time for each worker, which is what it told Ray that it needs: one core.
            fcntl.lockf(lock, fcntl.LOCK_EX)
            try:
                connection.send_bytes(encode_stage("decode"))
                stage, started = "decode", time.monotonic()
                decoded = _decode(request, file, options, buffer)
                decode_s = time.monotonic() - started
            finally:
                fcntl.lockf(lock, fcntl.LOCK_UN)
            return encode_answer(decoded, sha256, fetch_s, decode_s)
    except _FilteredError as error:
        return encode_failure(MediaFailure("filter", str(error)))
    except FetchError as error:
        return encode_failure(MediaFailure("fetch", str(error)))
    except UnreadableError as error:
        return encode_failure(MediaFailure("probe", str(error)))
    except MediaError as error:
        return encode_failure(MediaFailure(stage, str(error)))
    except MemoryError:
        reason = f"it needs more memory than limits.memory_mb={options.limits.memory_mb}"
        return encode_failure(MediaFailure(stage, reason))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # Every row would fail like this one, and be taken for a bad file.
            return encode_fatal(
                f"the temporary folder {tempfile.gettempdir()} of {platform.node()} is full; set TMPDIR"
            )
        return encode_failure(MediaFailure(stage, f"unexpected {type(error).__name__}: {error}"))
    except Exception as error:  # one strange file must not cost the other rows of its shard
        return encode_failure(MediaFailure(stage, f"unexpected {type(error).__name__}: {error}"))


def _decode(request: MediaRequest, file: BinaryIO, options: MediaOptions, buffer: int) -> Decoded:
    """Writes the sample's members into the buffer."""
    os.ftruncate(buffer, 0)
    os.lseek(buffer, 0, os.SEEK_SET)
    if options.payload == "video" and request.kind == "video":
        video = stored_video(
            file, options.video, options.frames.max_pixels, start_s=request.start_s, end_s=request.end_s
        )
        _refuse(refuse_source(video.source, request.kind, options.filters))
        with video.file as contents:
            size = _copy(contents, buffer)
        return Decoded([(video.extension, size)], (), video.source, None)
    frames: Sequence[NDArray[np.uint8]]
    timestamps_s: tuple[float, ...]
    sampling = None
    if request.kind == "image":
        picture, source = read_image(file, options.frames)
        frames, timestamps_s = (picture,), (0.0,)
    else:
        clip = sparse_frames(file, options.frames, start_s=request.start_s, end_s=request.end_s)
        frames, timestamps_s, source, sampling = clip.frames, clip.timestamps_s, clip.source, clip.sampling
    _refuse(refuse_source(source, request.kind, options.filters))
    _refuse(refuse_frames(frames, options.filters))
    sizes = []
    for number, frame in enumerate(frames):
        jpeg = encode_jpeg(frame, options.frames.quality, options.frames.chroma)
        write_all(buffer, jpeg)
        sizes.append((frame_extension(number), len(jpeg)))
    return Decoded(sizes, timestamps_s, source, sampling)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise _FilteredError(reason)


def _copy(contents: BinaryIO, buffer: int) -> int:
    size = 0
    while chunk := contents.read(_COPY_BYTES):
        write_all(buffer, chunk)
        size += len(chunk)
    return size


if __name__ == "__main__":
    main(sys.argv[1:])
