"""What a clip's frames are seen through, and PEM's crop box: pure functions of the draws."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alpro_stream.manifest import Kind
from alpro_stream.stream.augment import Augment, draw_operations
from alpro_stream.stream.seeds import Draws, uniform_at
from alpro_stream.stream.view import View, Window

# Of PEM's boxes, which find their place in one try of seven.
_FIRST_TRIES, _MAX_TRIES = 32, 1000
# Of the random resized crop, as published: share of the area, and width over height.
_MIN_AREA, _MAX_AREA = 0.2, 1.0
_MIN_RATIO, _MAX_RATIO = 3 / 4, 4 / 3
_MAX_RESIZED_TRIES = 10


def draw_view(
    kind: Kind,
    stored_size: int | None,
    identity: tuple[int | str, ...],
    *,
    crop_scale: float,
    flip_probability: float,
    augment: Augment,
) -> View:
    """What a step sees of a clip: a pure function of its identity and the settings of the stream.

    Args:
        kind: of the clip's media. With augmentation, images get the published random resized crop, bicubic, whatever
            `crop_scale`; and videos are mirrored by one of the operations, whatever `flip_probability`.
        stored_size: see `random_window`.
        identity: names the sample and its pass.
        crop_scale: see `random_window`; 1 shows the whole frame.
        flip_probability: of mirroring.
        augment: rule of the operations.
    """
    augmented_image, augmented_video = augment != "none" and kind == "image", augment != "none" and kind == "video"
    place = Draws("crop", *identity)
    return View(
        window=random_resized_window(place) if augmented_image else random_window(stored_size, crop_scale, place),
        interpolation="bicubic" if augmented_image else "bilinear",
        flip=not augmented_video and Draws("flip", *identity).scalar() < flip_probability,
        operations=() if augment == "none" else draw_operations(kind, augment, Draws("augment", *identity)),
    )


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
        return draws.scalar() * (1 - crop_scale), draws.scalar() * (1 - crop_scale), crop_scale, crop_scale
    side = max(1, round(stored_size * crop_scale))
    left, top = draws.integer(stored_size - side + 1), draws.integer(stored_size - side + 1)
    return left / stored_size, top / stored_size, side / stored_size, side / stored_size


def random_resized_window(draws: Draws, aspect: float = 1.0) -> Window:
    """A window of 20 to 100 % of the frame's area, at any place: the published random resized crop of images.

    Width over height is 3/4 to 4/3, uniform in its logarithm; a window that the frame does not hold is drawn again, ten
    times at most; then it is the largest one of such a ratio in the middle of the frame. All as in torchvision, but
    in fractions, where torchvision rounds to whole pixels first.

    Args:
        draws: for all of it.
        aspect: width over height of the frame as it is stored, to whose pixels the ratio refers. 1 for frames of our
            own shards, squares into which the pictures were squeezed whatever their shape: the window has a ratio of
            3/4 to 4/3 there, not in the picture as it was. With 1 for frames of other shapes, the window is the one
            that a stored square would get.
    """
    for _ in range(_MAX_RESIZED_TRIES):
        area, ratio, left, top = (draws.scalar() for _ in range(4))
        area = _MIN_AREA + (_MAX_AREA - _MIN_AREA) * area
        ratio = _MIN_RATIO * (_MAX_RATIO / _MIN_RATIO) ** ratio
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
        if max(width, height) <= 1:
            return left * (1 - width), top * (1 - height), width, height
    width, height = min(1.0, _MAX_RATIO / aspect), min(1.0, aspect / _MIN_RATIO)
    return (1 - width) / 2, (1 - height) / 2, width, height


def black_outside(clip_THWC: Tensor, box: NDArray[np.int64]) -> None:
    """Makes everything outside the box (top, left, height, width in pixels) black, in place."""
    top, left, height, width = box.tolist()
    inside = clip_THWC[:, top : top + height, left : left + width].clone()
    clip_THWC.zero_()
    clip_THWC[:, top : top + height, left : left + width] = inside


def pem_crop_boxes(image_size: int, patch_size: int, keys_B: NDArray[np.uint64]) -> NDArray[np.int64]:
    """PEM's crops: (top, left, height, width) in patches (paper, section 3.3).

    Area 30-50 % of the frame, height over width 0.3 to 1/0.3, corner uniform over the pixels, everything
    rounded down to whole patches; a box that leaves the frame, or is rounded to nothing, is drawn again, all
    four numbers.

    Args:
        image_size: side of the frame, pixels.
        patch_size: side of a patch, pixels.
        keys_B: one a clip, from `alpro_stream.stream.seeds.sample_keys`.

    Returns:
        (B, 4).
    """
    # Only grids of very few patches keep this: the whole frame but one row and column is the honest rest.
    side = max(1, image_size // patch_size - 1)
    boxes_B4 = np.tile(np.array([0, 0, side, side], dtype=np.int64), (len(keys_B), 1))
    rows = np.arange(len(keys_B))
    for num_tries in (_FIRST_TRIES, _MAX_TRIES):
        area, aspect, left, top = np.moveaxis(uniform_at(keys_B[rows], 4 * num_tries).reshape(-1, num_tries, 4), 2, 0)
        tries, fits = align_boxes(0.3 + 0.2 * area, 0.3 + (1 / 0.3 - 0.3) * aspect, left, top, image_size, patch_size)
        found = fits.any(axis=1)
        boxes_B4[rows[found]] = tries[:, found, fits.argmax(axis=1)[found]].T
        rows = rows[~found]
        if not len(rows):
            break
    return boxes_B4


def align_boxes(
    area: NDArray[np.float64],
    aspect: NDArray[np.float64],
    left: NDArray[np.float64],
    top: NDArray[np.float64],
    image_size: int,
    patch_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draws of crop boxes in patches, and whether the frame holds them.

    Args:
        area: shares of the frame.
        aspect: height over width.
        left: left edges as fractions of the frame, in [0, 1).
        top: top edges as fractions of the frame, in [0, 1).
        image_size: side of the frame, pixels.
        patch_size: side of a patch, pixels.

    Returns:
        (4, ...): top, left, height and width of each; and (...): whether it fits.
    """
    grid, pixels = image_size // patch_size, area * image_size**2
    edges = np.stack([top * image_size, left * image_size, np.sqrt(pixels * aspect), np.sqrt(pixels / aspect)])
    # None is negative: what is cut off is rounded down, and in a tenth of the time of `//`.
    boxes = (edges / patch_size).astype(np.int64)
    corners, sizes = boxes[:2], boxes[2:]
    return boxes, np.asarray(((sizes >= 1) & (corners + sizes <= grid)).all(axis=0))
