"""The window of the frame that the model sees, and PEM's crop box: pure functions of the draws."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alpro_stream.stream.decode import Window
from alpro_stream.stream.seeds import Draws

_MAX_TRIES = 1000


def random_window(stored_size: int | None, crop_scale: float, draws: Draws) -> Window:
    """A window of the stored frame with its aspect ratio, any place equally likely.

    The published recipe takes 224 of 256 pixels, a `crop_scale` of 0.875.

    Args:
        stored_size: side of the stored square, pixels: the window is one of whole pixels. None where frames are not
            squares of one size: the window is then at any fraction.
        crop_scale: side of the window over that of the frame.
        draws: for its place.
    """
    if stored_size is None:
        left, top = draws.uniform(2) * (1 - crop_scale)
        return float(left), float(top), crop_scale, crop_scale
    side = max(1, round(stored_size * crop_scale))
    left, top = np.floor(draws.uniform(2) * (stored_size - side + 1))
    return left / stored_size, top / stored_size, side / stored_size, side / stored_size


def black_outside(clip_THWC: Tensor, box: NDArray[np.int64]) -> None:
    """Makes everything outside the box (top, left, height, width in pixels) black, in place."""
    top, left, height, width = box.tolist()
    inside = clip_THWC[:, top : top + height, left : left + width].clone()
    clip_THWC.zero_()
    clip_THWC[:, top : top + height, left : left + width] = inside


def pem_crop_box(image_size: int, patch_size: int, draws: Draws) -> NDArray[np.int64]:
    """PEM's crop: (top, left, height, width) in patches (paper, section 3.3).

    Area 30-50 % of the frame, height over width 0.3 to 1/0.3, corner uniform over the pixels, everything
    rounded down to whole patches; a box that leaves the frame, or is rounded to nothing, is drawn again, all
    four numbers.
    """
    for _ in range(_MAX_TRIES):
        area, aspect, left, top = draws.uniform(4)
        box = align_box(0.3 + 0.2 * area, 0.3 + (1 / 0.3 - 0.3) * aspect, left, top, image_size, patch_size)
        if box is not None:
            return np.asarray(box, dtype=np.int64)
    # Only grids of very few patches get here: the whole frame but one row and column is the honest rest.
    grid = image_size // patch_size
    return np.asarray((0, 0, max(1, grid - 1), max(1, grid - 1)), dtype=np.int64)


def align_box(
    area: float, aspect: float, left: float, top: float, image_size: int, patch_size: int
) -> tuple[int, int, int, int] | None:
    """One draw of a crop box in patches, or None if the frame does not hold it.

    Args:
        area: share of the frame.
        aspect: height over width.
        left: left edge as a fraction of the frame, in [0, 1).
        top: top edge as a fraction of the frame, in [0, 1).
        image_size: side of the frame, pixels.
        patch_size: side of a patch, pixels.
    """
    height = math.sqrt(area * image_size**2 * aspect) // patch_size
    width = math.sqrt(area * image_size**2 / aspect) // patch_size
    row, column = top * image_size // patch_size, left * image_size // patch_size
    grid = image_size // patch_size
    if min(height, width) < 1 or row + height > grid or column + width > grid:
        return None
    return int(row), int(column), int(height), int(width)
