"""The process in which stored videos are decoded, and stored frames are checked: it may hang or crash.

Started by `isolated` as a `KillableProcess` with one open file. That holds the bytes of the request, and then the
pixels of the answer. It imports no torch, which takes seconds to load.
"""

import io
import json
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, sparse_frames, window_of
from alpro_stream.media.killable import connect, limit_memory, write_all
from alpro_stream.stream.frames import FramePolicy, choose_frames
from alpro_stream.stream.seeds import Draws

# An answer has to be small, and some libraries put much into their messages.
_MAX_REASON = 1000
# Ours are JPEG; collections of images have these too.
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """What is wanted of a stored video.

    Attributes:
        num_frames: how many frames.
        policy: how they are chosen among those that a data set of frames would hold.
        identity: names the draws of the choice.
        window: (left, top, width, height) as fractions of the frame.
        flip: mirror left and right, after cropping.
        image_size: side of the pixels handed out.
        frames: the frames that a data set of frames would hold, and their size.
    """

    num_frames: int
    policy: FramePolicy
    identity: tuple[int | str, ...]
    window: tuple[float, float, float, float]
    flip: bool
    image_size: int
    frames: FrameConfig


@dataclass(frozen=True, slots=True)
class JpegRequest:
    """JPEG files to decode on trial, one after the other in the open file.

    Attributes:
        sizes: bytes of each.
    """

    sizes: tuple[int, ...]


Request = ClipRequest | JpegRequest


def encode_request(request: Request) -> bytes:
    """What `decode_request` reads."""
    return json.dumps(asdict(request), default=FrameConfig.model_dump).encode()


def decode_request(data: bytes) -> Request:
    """The inverse of `encode_request`."""
    values = json.loads(data)
    if "sizes" in values:
        return JpegRequest(tuple(values["sizes"]))
    for name in ("identity", "window"):
        values[name] = tuple(values[name])
    return ClipRequest(**{**values, "frames": FrameConfig(**values["frames"])})


def main(arguments: list[str]) -> None:
    """Says that it is ready, and answers requests until the connection ends.

    An answer is a sentence that says what is wrong, or empty; so is the word of being ready.
    """
    connection, (buffer,) = connect(arguments)
    memory_mb = int(connection.recv_bytes())
    limit_memory(memory_mb << 20)
    warnings.simplefilter("ignore")  # Pillow warns of what is checked or raised here
    with suppress(EOFError, OSError, KeyboardInterrupt):  # the other process ended
        connection.send_bytes(b"")
        while True:
            request = decode_request(connection.recv_bytes())
            connection.send_bytes(_answer(request, buffer, memory_mb)[:_MAX_REASON].encode(errors="replace"))


def clip_pixels(frames: tuple[NDArray[np.uint8], ...], request: ClipRequest) -> NDArray[np.uint8]:
    """Cuts frames to the window in whole pixels, resizes and mirrors them.

    Args:
        frames: RGB, [height, width, 3] each.
        request: window, size and mirroring.

    Returns:
        Shape [frames, image_size, image_size, 3].
    """
    return np.stack([_cut(frame, request) for frame in frames])


def _answer(request: Request, buffer: int, memory_mb: int) -> str:
    try:
        if isinstance(request, JpegRequest):
            return _check_jpegs(request, buffer)
        _decode_clip(request, buffer)
    except MediaError as error:
        return str(error) or "the video cannot be decoded"
    except MemoryError:
        return f"it needs more memory than {memory_mb} MiB"
    except Exception as error:  # one strange file must not cost the other samples
        return f"unexpected {type(error).__name__}: {error}"
    return ""


def _check_jpegs(request: JpegRequest, buffer: int) -> str:
    position = 0
    for number, size in enumerate(request.sizes):
        data = os.pread(buffer, size, position)
        position += size
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()  # the whole file, so that a truncated one is an error and not grey
        except (OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError) as error:
            # Pillow names the object that it was to read, which tells nothing.
            reason = (
                f"not a picture of {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)
            )
            return f"frame {number} of {len(request.sizes)}: {reason}"
    return ""


def _decode_clip(request: ClipRequest, buffer: int) -> None:
    """Puts the pixels into the open file."""
    size = os.fstat(buffer).st_size
    if size == 0:
        raise MediaError("the video is empty")
    with window_of(buffer, 0, size) as video:
        clip = sparse_frames(
            video,
            request.frames,
            choose=lambda num_stored: choose_frames(
                num_stored, request.num_frames, request.policy, Draws("frames", *request.identity)
            ).tolist(),
        )
    pixels = clip_pixels(clip.frames, request)
    os.lseek(buffer, 0, os.SEEK_SET)
    write_all(buffer, pixels.data)


def _cut(frame: NDArray[np.uint8], request: ClipRequest) -> NDArray[np.uint8]:
    height, width = frame.shape[:2]
    left, top = round(request.window[0] * width), round(request.window[1] * height)
    right, bottom = left + round(request.window[2] * width), top + round(request.window[3] * height)
    cut = frame[top:bottom, left:right]
    if cut.shape[:2] != (request.image_size, request.image_size):
        # Pillow's bilinear filter widens when it shrinks, so it does not alias.
        size = (request.image_size, request.image_size)
        cut = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BILINEAR))
    return cut[:, ::-1] if request.flip else cut


if __name__ == "__main__":
    main(sys.argv[1:])
