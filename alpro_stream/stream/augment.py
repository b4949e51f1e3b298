"""The published augmentations beyond crop and flip: which a clip gets, and what they do to its pixels.

The choice is a pure function of the draws and knows no pixels; the pixels change by the choice alone, in all frames of
a clip alike. Operations and strengths are those of the published code, see `RECIPES`. Tensors: T frames, H, W, C.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from alpro_stream.manifest import Kind
from alpro_stream.stream.seeds import Draws

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

_MAX_LEVEL = 10
_GREY = 128.0


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
        # At this level contrast, brightness and sharpness do nothing: their factor is 1. It is the published one.
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


def argument_of(operation: Operation, level: float) -> float:
    """Strength of an operation at a level of 0 to 10; shifts, shears and turns go one way only, as published.

    Contrast, brightness and sharpness: a factor, 1 changes nothing. Shear: pixels per pixel. Shift: pixels, whatever
    the size of the frame. Rotation: degrees. Identity and flip: 0.
    """
    match operation:
        case "contrast" | "brightness" | "sharpness":
            return level / _MAX_LEVEL * 1.8 + 0.1
        case "shear_x" | "shear_y":
            return level / _MAX_LEVEL * 0.3
        case "translate_x" | "translate_y":
            return level / _MAX_LEVEL * 10
        case "rotate":
            return level / _MAX_LEVEL * 30
        case "identity" | "flip":
            return 0.0


def draw_operations(recipe: Recipe, draws: Draws) -> tuple[AppliedOperation, ...]:
    """The operations that one clip gets, in their order."""
    if recipe.replacement:
        chosen = [draws.integer(len(recipe.operations)) for _ in range(recipe.count)]
    else:
        chosen = draws.permutation(len(recipe.operations))[: recipe.count].tolist()
    applied = draws.uniform(recipe.count) < recipe.probability
    operations = [recipe.operations[index] for index, yes in zip(chosen, applied, strict=True) if yes]
    return tuple((operation, argument_of(operation, recipe.magnitude)) for operation in operations)


def augment(frames_THWC: Tensor, operations: Sequence[AppliedOperation]) -> Tensor:
    """Applies the operations one after the other to all frames of a clip alike.

    Args:
        frames_THWC: RGB, uint8, on any device; not modified.
        operations: of `draw_operations`.

    Returns:
        uint8 of the same shape; `frames_THWC` itself where no operation changes anything.
    """
    effective = [(operation, argument) for operation, argument in operations if not _is_neutral(operation, argument)]
    if not effective:
        return frames_THWC
    frames_TCHW = frames_THWC.permute(0, 3, 1, 2)
    for operation, argument in effective:
        frames_TCHW = _APPLY[operation](frames_TCHW, argument)
    return frames_TCHW.permute(0, 2, 3, 1).contiguous()


def _is_neutral(operation: Operation, argument: float) -> bool:
    """Whether every pixel stays as it is."""
    if operation in ("contrast", "brightness", "sharpness"):
        return argument == 1.0
    return argument == 0.0 and operation != "flip"


def _shear_x(frames_TCHW: Tensor, slope: float) -> Tensor:
    """Moves each row to the right by its distance from the top row times the slope; the top row stays."""
    return _warp(frames_TCHW, shear=(-math.degrees(math.atan(slope)), 0.0), center=(0.5, 0.5))


def _shear_y(frames_TCHW: Tensor, slope: float) -> Tensor:
    """Moves each column down by its distance from the left one times the slope."""
    return _warp(frames_TCHW, shear=(0.0, -math.degrees(math.atan(slope))), center=(0.5, 0.5))


def _translate_x(frames_TCHW: Tensor, pixels: float) -> Tensor:
    """Moves the picture to the left."""
    return _warp(frames_TCHW, translate=(-pixels, 0.0))


def _translate_y(frames_TCHW: Tensor, pixels: float) -> Tensor:
    """Moves the picture up."""
    return _warp(frames_TCHW, translate=(0.0, -pixels))


def _rotate(frames_TCHW: Tensor, degrees: float) -> Tensor:
    """Turns against the clock, about the published centre: half a pixel right of and below that of the frame."""
    height, width = frames_TCHW.shape[-2:]
    return _warp(frames_TCHW, angle=-degrees, center=(width / 2 + 0.5, height / 2 + 0.5))


def _warp(
    frames_TCHW: Tensor,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
    center: tuple[float, float] | None = None,
) -> Tensor:
    """An affine map, bilinear, grey outside; pixel centres at halves and angles with the clock, as in torchvision."""
    # Grey is made the zero of the warp: torchvision's own `fill` darkens the pixels at the edge of the picture.
    moved_TCHW: Tensor = tv.affine(
        frames_TCHW.float() - _GREY,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=tv.InterpolationMode.BILINEAR,
        center=None if center is None else list(center),
    )
    return (moved_TCHW + _GREY).round().to(torch.uint8)


_APPLY: Mapping[Operation, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda frames, _: frames,
    "contrast": tv.adjust_contrast,
    "brightness": tv.adjust_brightness,
    "sharpness": tv.adjust_sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "flip": lambda frames, _: tv.horizontal_flip(frames),
}
