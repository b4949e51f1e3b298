"""Still images, read and written with Pillow."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from alpro_stream.errors import MediaError, UnreadableError
from alpro_stream.media.options import Chroma, FrameConfig
from alpro_stream.media.probe import SourceInfo
from alpro_stream.media.size import refuse_pixels, scaled_size

_SUBSAMPLING = {"420": 2, "444": 0}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# A JPEG is decoded at a half, a quarter or an eighth where that leaves this many times the pixels wanted on a side.
_LEAST_DRAFT = 2


def read_image(file: BinaryIO, options: FrameConfig) -> tuple[npt.NDArray[np.uint8], SourceInfo]:
    """Reads an image as RGB of shape [height, width, 3], resized, upright by its EXIF orientation.

    Grey, CMYK, palette and 16-bit images become RGB; transparent parts are put on white. A large JPEG is decoded at
    a fraction of its size.

    Args:
        file: open for reading and seekable.
        options: `size`, `resize` and `max_pixels`. The limit of pixels is on what is decoded, and half for
            WebP; above 178 million a JPEG is refused too.

    Raises:
        UnreadableError: no image, or one of too many pixels.
        MediaError: a truncated or otherwise damaged one.
    """
    with _opened(file, options.max_pixels) as image:
        return _decode(image, options)


def read_whole_image(file: BinaryIO, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Reads an image as RGB of shape [height, width, 3] at its own size, upright, as `read_image` does otherwise.

    Raises:
        UnreadableError: no image, or one of more than `max_pixels`.
        MediaError: a truncated or otherwise damaged one.
    """
    with _opened(file, max_pixels) as image:
        refuse_pixels("image", *image.size, _limit(image, max_pixels))
        image.load()
        return _small_rgb(image, *image.size)


def encode_jpeg(pixels: npt.NDArray[np.uint8], quality: int, chroma: Chroma = "420") -> bytes:
    """Encodes RGB pixels of shape [height, width, 3] as baseline JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling=_SUBSAMPLING[chroma])
    return buffer.getvalue()


def square_rgb(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """A picture as RGB of shape [size, size, 3], whatever its aspect ratio, upright by its EXIF orientation.

    Grey, CMYK, palette and 16-bit pictures become RGB; transparent parts are put on white.
    """
    return _small_rgb(image, size, size)


@contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked or raised here
            with Image.open(file, formats=_FORMATS) as image:
                yield image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError(f"no image: expected {', '.join(_FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"the image has more pixels than the limit of {max_pixels}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise MediaError(f"the image cannot be decoded: {error}") from error


def _limit(image: Image.Image, max_pixels: int) -> int:
    return max_pixels // 2 if image.format == "WEBP" else max_pixels  # its decoder holds the picture twice


def _decode(image: Image.Image, options: FrameConfig) -> tuple[npt.NDArray[np.uint8], SourceInfo]:
    codec = str(image.format).lower()
    stored_width, stored_height = image.size
    width, height = scaled_size(stored_width, stored_height, options.size, options.resize)
    # A progressive JPEG has to be held whole at any size.
    if codec == "jpeg" and not image.info.get("progressive"):
        image.draft(None, (_LEAST_DRAFT * width, _LEAST_DRAFT * height))
    refuse_pixels("image", *image.size, _limit(image, options.max_pixels))
    image.load()  # the whole file, so that a truncated one is an error and not grey
    pixels = _small_rgb(image, width, height)
    if _orientation(image) in _SIDEWAYS:
        stored_width, stored_height = stored_height, stored_width
    return pixels, SourceInfo(stored_width, stored_height, codec, None, 1)


def _small_rgb(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """The picture as RGB of shape [height, width, 3] before it is turned upright.

    Scaling comes first and the rest is done on the small picture, which keeps memory low; transparent pixels are
    weighted by what they cover.
    """
    small = _plain(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if small.has_transparency_data:
        rgba = small.convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    turn = _UPRIGHT.get(_orientation(image))
    upright = small if turn is None else small.transpose(turn)
    return np.asarray(upright.convert("RGB"))


def _plain(image: Image.Image) -> Image.Image:
    """The picture in a mode that Pillow can scale."""
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        # Grey with transparency is scaled as it is: a copy in four channels would be the third picture in memory.
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))
