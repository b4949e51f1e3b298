"""The size that a picture is stored in: pure arithmetic."""

from fractions import Fraction
from typing import Literal

from alpro_stream.errors import MediaError, UnreadableError

Resize = Literal["square", "short_side"]
"""A square whatever the aspect ratio, or the short side given and the aspect ratio kept."""

MAX_ASPECT = 8
"""Longest side of a stored picture in short sides: a strip of one line would otherwise become gigabytes."""


def scaled_size(
    width: int, height: int, size: int, resize: Resize, pixel_aspect: Fraction | None = None
) -> tuple[int, int]:
    """Width and height to store.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        size: side of a square, or the short side.
        resize: which of the two.
        pixel_aspect: width of the picture's pixels by their height; None for square ones.

    Raises:
        MediaError: `short_side` of a picture longer than `MAX_ASPECT` times its short side.
    """
    if resize == "square":
        return size, size
    aspect = Fraction(width, height) * (pixel_aspect or 1)
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise MediaError(
            f"the picture is shown {float(aspect):.3g} times as wide as high; resize=short_side takes up to "
            f"{MAX_ASPECT} to 1, resize=square takes any"
        )
    return (round(size * aspect), size) if aspect >= 1 else (size, round(size / aspect))


def displayed_size(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Width and height of a picture once its pixels are square, its height kept."""
    return max(round(width * (pixel_aspect or Fraction(1))), 1), height


def refuse_pixels(kind: str, width: int, height: int, max_pixels: int) -> None:
    """Refuses a picture that is too large to decode.

    Raises:
        UnreadableError: more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise UnreadableError(
            f"the {kind} has {width} x {height} pixels, more than the limit of {max_pixels} (frames.max_pixels)"
        )
