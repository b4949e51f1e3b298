"""One stored frame by libjpeg-turbo, which works without Python's lock; imports no torch, as workers should not."""

import threading

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from alpro_stream.stream.view import View, show

# What a thread keeps from one frame to the next: larger frames are rare, and no cache would hold them.
_MOST_KEPT_BYTES = 4 << 20


class _Room(threading.local):
    """Where a thread decodes: memory that it has just used is still in the core's cache."""

    def __init__(self) -> None:
        self.pixels = np.empty(0, np.uint8)

    def of_size(self, num_bytes: int) -> NDArray[np.uint8]:
        if num_bytes > _MOST_KEPT_BYTES:
            return np.empty(num_bytes, np.uint8)
        if self.pixels.size < num_bytes:
            self.pixels = np.empty(num_bytes, np.uint8)
        return self.pixels


_room = _Room()


def decode_frame(
    jpeg: bytes | memoryview, width: int, height: int, view: View, out_HWC: NDArray[np.uint8]
) -> str | None:
    """Writes what the view shows of a frame; accurate DCT and smooth upsampling, the pixels of an image viewer.

    Strict: a frame with damage that other decoders paint over is refused.

    Args:
        jpeg: the stored bytes.
        width: of the stored frame, in pixels.
        height: of the stored frame, in pixels.
        view: what is seen of it.
        out_HWC: of the model's image size.

    Returns:
        What is wrong with the frame, None where nothing is.
    """
    room = _room.of_size(3 * height * width)
    try:
        frame_HWC = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=room)
    except ValueError as error:
        return str(error)
    show(frame_HWC, view, out_HWC)
    return None
