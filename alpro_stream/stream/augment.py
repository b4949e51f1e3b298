"""The published augmentations beyond crop and flip: which a clip gets, and what they do to its frames on a CPU.

The choice is a pure function of the draws and knows no pixels; the pixels change by the choice alone, every frame of a
clip by the same one. Operations and strengths are those of the published code, see `RECIPES` and `Augment`. They add
and multiply whole numbers or warp in OpenCV's fixed steps, so the pixels are the same for any number of threads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from alpro_stream.manifest import Kind
from alpro_stream.stream.seeds import Draws

# OpenCV splits large frames over threads of its own, as many as there are cores and whatever number of decoder
# threads is declared. The decoder's threads have a frame each, which keeps the cores as busy.
cv2.setNumThreads(0)

Augment = Literal["none", "published", "increasing"]
"""How strongly a stream augments.

- ``none``, the default of a stream: no operations. So does published fine-tuning for retrieval.
- ``published``: as the published code does, the default of the pre-training configurations, so that their results can
  be held against the paper's. A factor of contrast, brightness or sharpness is 0.1 + 0.18 a level: exactly 1 at level
  5, that of videos, so these three operations change nothing there; and images get only brighter and sharper.
- ``increasing``: the same choice, but the factors are 1 + 0.09 or 1 - 0.09 a level with equal chance, so that a higher
  level changes more and level 0 nothing (0.55 or 1.45 for videos, 0.37 or 1.63 for images). The other operations stay
  as published. For new recipes: stronger for videos than what the paper's numbers were reached with.
"""
Operation = Literal[
    "identity",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "flip",
]
AppliedOperation = tuple[Operation, float]
"""An operation and its argument, see `argument_of`."""

GREY = 128
"""What is seen outside of a moved frame, in all channels."""
_MAX_LEVEL = 10
# Of red, green and blue, ITU-R BT.601.
LUMA = (0.299, 0.587, 0.114)
BLUR = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
# Steps of a sharpness factor. Bytes times these fit into the 24 bits of a float32, so no rounding depends on the order
# of sums or on the instructions of a processor.
_FACTOR_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """What one kind of media is augmented with.

    Attributes:
        operations: those to choose from, all equally likely.
        magnitude: level of all operations, 0 to 10.
        count: how many are chosen.
        replacement: whether the same one may be chosen twice.
        probability: share of the chosen ones that are applied.
    """

    operations: tuple[Operation, ...]
    magnitude: int
    count: int = 2
    replacement: bool = False
    probability: float = 1.0


RECIPES: Mapping[Kind, Recipe] = {
    "video": Recipe(
        operations=(
            "identity",
            "contrast",
            "brightness",
            "sharpness",
            "shear_x",
            "shear_y",
            "translate_x",
            "translate_y",
            "rotate",
            "flip",
        ),
        magnitude=5,
    ),
    "image": Recipe(
        operations=(
            "identity",
            "brightness",
            "sharpness",
            "shear_x",
            "shear_y",
            "translate_x",
            "translate_y",
            "rotate",
        ),
        magnitude=7,
        replacement=True,
        probability=0.5,
    ),
}
"""As published for pre-training; the flip of an image is drawn apart, with probability 0.5, before these."""


def argument_of(operation: Operation, level: int, augment: Augment = "published", up: bool = True) -> float:
    """Strength of an operation at a level of 0 to 10; shifts, shears and turns go one way only, as published.

    Contrast, brightness and sharpness: a factor, 1 changes nothing. Shear: pixels per pixel. Shift: whole pixels,
    whatever the size of the frame. Rotation: degrees. Identity and flip: 0.

    Args:
        operation: whose argument.
        level: how strong.
        augment: rule of the factors; ``none`` is taken for ``published``.
        up: with ``increasing``, whether a factor is above 1; else it is below.
    """
    match operation:
        case "contrast" | "brightness" | "sharpness":
            if augment == "increasing":
                change = level / _MAX_LEVEL * 0.9
                return 1 + change if up else 1 - change
            return level / _MAX_LEVEL * 1.8 + 0.1
        case "shear_x" | "shear_y":
            return level / _MAX_LEVEL * 0.3
        case "translate_x" | "translate_y":
            return float(level)
        case "rotate":
            return level / _MAX_LEVEL * 30
        case "identity" | "flip":
            return 0.0


def draw_operations(kind: Kind, augment: Augment, draws: Draws) -> tuple[AppliedOperation, ...]:
    """The operations that one clip gets, in their order; none of them with ``none``."""
    if augment == "none":
        return ()
    recipe = RECIPES[kind]
    if recipe.replacement:
        chosen = [draws.integer(len(recipe.operations)) for _ in range(recipe.count)]
    else:
        chosen = draws.permutation(len(recipe.operations))[: recipe.count].tolist()
    # Signs last: `increasing` then chooses the operations that `published` does.
    applied, ups = draws.uniform(recipe.count) < recipe.probability, draws.uniform(recipe.count) < 0.5
    return tuple(
        (recipe.operations[index], argument_of(recipe.operations[index], recipe.magnitude, augment, bool(up)))
        for index, yes, up in zip(chosen, applied, ups, strict=True)
        if yes
    )


def augment(frame_HWC: NDArray[np.uint8], operations: Sequence[AppliedOperation]) -> NDArray[np.uint8]:
    """Applies the operations one after the other to a frame.

    Args:
        frame_HWC: RGB; a part of a larger frame is fine; not modified.
        operations: of `draw_operations`; the same ones for every frame of a clip.

    Returns:
        A frame of the same shape; `frame_HWC` itself where no operation changes anything.
    """
    for operation, argument in operations:
        frame_HWC = _apply(frame_HWC, operation, argument)
    return frame_HWC


def mirror(frame_HWC: NDArray[np.uint8], out_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Writes the frame with left and right exchanged to `out_HWC`, C-contiguous and no part of the frame; returns it.

    A copy by numpy of the reversed columns takes 30 times as long.
    """
    cv2.flip(frame_HWC, 1, dst=out_HWC)
    return out_HWC


def warp_matrix(operation: Operation, argument: float, height: int, width: int) -> NDArray[np.float64] | None:
    """Where each pixel of the result comes from, for the operations that move pixels.

    Args:
        operation: shear, shift, rotation or flip; None is returned for the other ones, which move nothing.
        argument: of `argument_of`.
        height: of the frame, pixels.
        width: of the frame, pixels.

    Returns:
        (2, 3) from (column, row, 1) in the result to (column, row) in the input. Centres of pixels are at whole
        numbers, the centre of the first one at (0, 0), as in OpenCV; where they are at halves, the input's position is
        ``matrix @ (x - 0.5, y - 0.5, 1) + 0.5``. `augment` samples bilinearly, at positions rounded to 1/32 of a
        pixel, and finds `GREY` outside.
    """
    match operation:
        case "shear_x":
            rows = [[1, -argument, 0], [0, 1, 0]]
        case "shear_y":
            rows = [[1, 0, 0], [-argument, 1, 0]]
        case "translate_x":
            rows = [[1, 0, argument], [0, 1, 0]]
        case "translate_y":
            rows = [[1, 0, 0], [0, 1, argument]]
        case "rotate":
            # Against the clock. The published centre: half a pixel right of and below that of the frame.
            cos, sin, x, y = math.cos(math.radians(argument)), math.sin(math.radians(argument)), width / 2, height / 2
            rows = [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
        case "flip":
            rows = [[-1, 0, width - 1], [0, 1, 0]]
        case "identity" | "contrast" | "brightness" | "sharpness":
            return None
    return np.array(rows, dtype=np.float64)


def _apply(frame_HWC: NDArray[np.uint8], operation: Operation, argument: float) -> NDArray[np.uint8]:
    height, width = frame_HWC.shape[:2]
    match operation:
        case "identity":
            return frame_HWC
        case "flip":
            return mirror(frame_HWC, np.empty((height, width, 3), dtype=np.uint8))
        case "contrast" | "brightness" | "sharpness":
            if argument == 1:
                return frame_HWC
            if operation == "sharpness":
                return _sharpen(frame_HWC, argument)
            # The published code takes red for blue here. Its factor is 1, so no published training saw that.
            grey = float(np.dot(cv2.mean(frame_HWC)[:3], LUMA)) if operation == "contrast" else 0.0
            return _scale(frame_HWC, argument, grey)
        case "translate_x" | "translate_y":
            return _shift(frame_HWC, int(argument), axis=1 if operation == "translate_x" else 0)
        case "shear_x" | "shear_y" | "rotate":
            matrix = warp_matrix(operation, argument, height, width)
            assert matrix is not None
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            return _bytes(cv2.warpAffine(frame_HWC, matrix, (width, height), flags=flags, borderValue=(GREY,) * 3))


def _scale(frame_HWC: NDArray[np.uint8], factor: float, origin: float) -> NDArray[np.uint8]:
    """Distances from a level times the factor, rounded down as published."""
    table = (origin + factor * (np.arange(256) - origin)).clip(0, 255).astype(np.uint8)
    return _bytes(cv2.LUT(frame_HWC, table))


def _sharpen(frame_HWC: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Differences from the blurred frame times the factor, rounded down; the outermost pixels stay, as published."""
    factor = round(factor * _FACTOR_STEPS) / _FACTOR_STEPS
    blurred_HWC = cv2.filter2D(frame_HWC, -1, BLUR)
    # `addWeighted` rounds to the nearest, which is down after half a level less; all but half, where it would tie.
    down = 0.5 / _FACTOR_STEPS - 0.5
    sharp_HWC = _bytes(cv2.addWeighted(frame_HWC, factor, blurred_HWC, 1 - factor, down))
    for edge in (0, -1):
        sharp_HWC[edge] = frame_HWC[edge]
        sharp_HWC[:, edge] = frame_HWC[:, edge]
    return sharp_HWC


def _shift(frame_HWC: NDArray[np.uint8], pixels: int, axis: int) -> NDArray[np.uint8]:
    """Moves the picture up (axis 0) or to the left (axis 1)."""
    moved_HWC = np.full_like(frame_HWC, GREY, order="C")
    kept = max(0, frame_HWC.shape[axis] - pixels)
    if axis == 0:
        moved_HWC[:kept] = frame_HWC[pixels:]
    else:
        moved_HWC[:, :kept] = frame_HWC[:, pixels:]
    return moved_HWC


def _bytes(pixels: cv2.typing.MatLike) -> NDArray[np.uint8]:
    # OpenCV's type hints do not say that bytes stay bytes.
    return np.asarray(pixels, dtype=np.uint8)
