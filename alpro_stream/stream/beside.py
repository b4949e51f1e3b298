"""Where a loader has a GPU work: beside the step, on a stream of its own, so that neither waits for the other."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Beside:
    """A stream of a GPU for what is made for the step; on a CPU nothing.

    On the stream of the step, which is that of all threads by default, everything that a step queues behind a batch
    being decoded would wait for its pixels inside the GPU, where no clock of the step sees it.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # Blocking: whoever waits sleeps, and leaves its core to what decodes.
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def entered(self) -> AbstractContextManager[object]:
        """Inside the `with` block, what the calling thread gives the GPU goes there."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Returns when all that was given to it is done: then any stream may use it."""
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()

    def lend(self, tensor: Tensor) -> None:
        """To be called before a tensor that was made there is used on the caller's stream.

        When the caller drops the tensor, its memory is not used again before that stream, too, is done with it.
        """
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
