"""Stored frames decoded by libjpeg-turbo in threads of this process: one frame a thread, without Python's lock."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from numpy.typing import NDArray

from alpro_stream.stream.decode import FrameDecoder, FrameError, FrameRequest
from alpro_stream.stream.reused import ReusedMemory
from alpro_stream.stream.turbo_frame import decode_frame


class TurboDecoder(FrameDecoder):
    """The pixels of `decode_frame`, all made while they are waited for.

    Args:
        num_threads: that decode at the same time, the caller's among them; 0 and 1 start none.
    """

    device = torch.device("cpu")
    needs_trial = False

    def __init__(self, num_threads: int) -> None:
        self._memory = ReusedMemory(shared=False)
        self._num_helpers = max(0, num_threads - 1)
        self._helpers = ThreadPoolExecutor(max(1, self._num_helpers), thread_name_prefix="alpro-turbo")

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """See `FrameDecoder.empty`."""
        return self._memory.empty(shape)

    def start(
        self, requests: Sequence[FrameRequest], out_NHWC: torch.Tensor, rows: Sequence[int]
    ) -> Callable[[], dict[int, FrameError]]:
        """See `FrameDecoder.start`."""
        return lambda: self._work(requests, out_NHWC.numpy(), rows)

    def close(self) -> None:
        """Ends the threads."""
        self._helpers.shutdown()

    def _work(
        self, requests: Sequence[FrameRequest], pixels: NDArray[np.uint8], rows: Sequence[int]
    ) -> dict[int, FrameError]:
        errors: dict[int, FrameError] = {}
        # Each thread takes the next one when it is free, so that all end at the same time; `next` of an iterator over
        # a range is one step of the interpreter.
        numbers = iter(range(len(requests)))

        def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                one = requests[number]
                error = decode_frame(one.jpeg, one.width, one.height, one.view, pixels[rows[number]])
                if error is not None:
                    errors[number] = FrameError("decode", error)

        helpers = [self._helpers.submit(work, numbers) for _ in range(min(self._num_helpers, len(requests) - 1))]
        try:
            work(numbers)
        finally:
            wait(helpers)  # they write into memory of the caller
        for helper in helpers:
            helper.result()
        return errors
