"""What a step sees of a clip: a window of the stored frames, resized, mirrored and augmented, all frames alike."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from alpro_stream.stream.augment import AppliedOperation, augment, mirror

Window = tuple[float, float, float, float]
"""(left, top, width, height) as fractions of the stored frame."""
WHOLE_FRAME: Window = (0.0, 0.0, 1.0, 1.0)

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class View:
    """What is done to every frame of a clip, in this order.

    Attributes:
        window: the part that is seen.
        interpolation: how it is resized to the model's image size; the filter widens where it shrinks.
        flip: mirror left and right.
        operations: the augmentations, of `draw_operations`.
    """

    window: Window = WHOLE_FRAME
    interpolation: Interpolation = "bilinear"
    flip: bool = False
    operations: tuple[AppliedOperation, ...] = ()


@lru_cache(maxsize=4096)  # the frames of a clip share theirs
def pixel_window(window: Window, width: int, height: int) -> tuple[int, int, int, int]:
    """A window in whole pixels, at least one and inside of the frame: (left, top, width, height)."""
    left, top = min(round(window[0] * width), width - 1), min(round(window[1] * height), height - 1)
    return (
        left,
        top,
        max(1, min(round(window[2] * width), width - left)),
        max(1, min(round(window[3] * height), height - top)),
    )


def show(frame_HWC: NDArray[np.uint8], view: View, out_HWC: NDArray[np.uint8]) -> None:
    """Writes what the view shows of a frame, on a CPU.

    Args:
        frame_HWC: RGB, of any size; not modified.
        view: what is seen.
        out_HWC: C-contiguous, of the size that is wanted.
    """
    height, width = frame_HWC.shape[:2]
    left, top, cut_width, cut_height = pixel_window(view.window, width, height)
    cut = frame_HWC[top : top + cut_height, left : left + cut_width]
    if cut.shape != out_HWC.shape:
        cut = _resized(cut, out_HWC.shape[0], out_HWC.shape[1], view.interpolation)
    if not view.operations:
        mirror(cut, out_HWC) if view.flip else np.copyto(out_HWC, cut)
        return
    if view.flip:
        cut = mirror(cut, np.empty_like(out_HWC))
    np.copyto(out_HWC, augment(cut, view.operations))


def load_resizing() -> None:
    """Loads what resizing takes, so that the first frame does not pay for it."""
    _resized(np.zeros((2, 2, 3), np.uint8), 1, 1, "bilinear")


def _resized(frame_HWC: NDArray[np.uint8], height: int, width: int, mode: Interpolation) -> NDArray[np.uint8]:
    # Here, as a worker that never resizes does without it: it takes seconds to load, and hundreds of MB.
    import torch

    # Its kernel for bytes: the pixels of Pillow, three times as fast.
    frame_1CHW = torch.from_numpy(np.ascontiguousarray(frame_HWC)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(frame_1CHW, size=(height, width), mode=mode, antialias=True)
    pixels: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return pixels
