"""Stored frames decoded by libjpeg-turbo, in threads: it works without Python's lock, as does what `show` calls."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from alpro_stream.stream.decode import FrameRequest
from alpro_stream.stream.view import show

# What a thread keeps from one frame to the next: larger frames are rare, and no cache would hold them.
_MOST_KEPT_BYTES = 4 << 20


class TurboDecoder:
    """Accurate DCT and smooth upsampling, the library's defaults: the pixels that an image viewer shows.

    Strict: a frame with damage that other decoders paint over is refused.

    Args:
        num_threads: that decode at the same time, the caller's among them; 0 and 1 start none.
    """

    device = torch.device("cpu")
    needs_trial = False

    def __init__(self, num_threads: int) -> None:
        self._num_helpers = max(0, num_threads - 1)
        self._helpers = ThreadPoolExecutor(max(1, self._num_helpers), thread_name_prefix="alpro-turbo")

    def decode(self, requests: Sequence[FrameRequest], out_NHWC: torch.Tensor, rows: Sequence[int]) -> dict[int, str]:
        """See `FrameDecoder.decode`."""
        pixels = out_NHWC.numpy()
        errors: dict[int, str] = {}
        # Each thread takes the next one when it is free, so that all end at the same time; `next` of an iterator over
        # a range is one step of the interpreter.
        numbers = iter(range(len(requests)))

        def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                error = _decode(requests[number], pixels[rows[number]])
                if error is not None:
                    errors[number] = error

        helpers = [self._helpers.submit(work, numbers) for _ in range(min(self._num_helpers, len(requests) - 1))]
        try:
            work(numbers)
        finally:
            wait(helpers)  # they write into memory of the caller
        for helper in helpers:
            helper.result()
        return errors

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()


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


def _decode(request: FrameRequest, out_HWC: NDArray[np.uint8]) -> str | None:
    room = _room.of_size(3 * request.height * request.width)
    try:
        frame_HWC = simplejpeg.decode_jpeg(request.jpeg, "RGB", buffer=room)
    except ValueError as error:
        return str(error)
    show(frame_HWC, request.view, out_HWC)
    return None
