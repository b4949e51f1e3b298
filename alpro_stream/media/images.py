"""Still images, read and written with Pillow."""

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from alpro_stream.errors import MediaError
from alpro_stream.media.container import UnreadableError, open_regular_file
from alpro_stream.media.probe import SourceInfo

# More than any camera gives; a few kilobytes of PNG can claim gigabytes of pixels.
MAX_IMAGE_PIXELS = 200_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def read_image(path: str | Path, size: int) -> tuple[npt.NDArray[np.uint8], SourceInfo]:
    """Reads an image as RGB of shape [size, size, 3], whatever its aspect ratio, upright by its EXIF orientation.

    Grey, CMYK, palette and 16-bit images become RGB; transparent parts are put on white.

    Raises:
        MediaError: no image, a truncated one, or one of more than `MAX_IMAGE_PIXELS`.
    """
    with open_regular_file(Path(path)) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of what is checked or raised here
                with Image.open(file, formats=_FORMATS) as image:
                    return _decode(image, size)
        except MediaError:
            raise
        except UnidentifiedImageError as error:
            raise UnreadableError(f"no image: expected {', '.join(_FORMATS)}") from error
        except Image.DecompressionBombError as error:
            raise UnreadableError(f"the image has more than {MAX_IMAGE_PIXELS} pixels") from error
        except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
            raise MediaError(f"the image cannot be decoded: {error}") from error


def encode_jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> bytes:
    """Encodes RGB pixels of shape [height, width, 3] as baseline JPEG with 4:2:0 chroma."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _decode(image: Image.Image, size: int) -> tuple[npt.NDArray[np.uint8], SourceInfo]:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise UnreadableError(
            f"the image has {image.width} x {image.height} pixels, more than the limit of {MAX_IMAGE_PIXELS}"
        )
    codec = str(image.format).lower()
    image.load()  # the whole file, so that a truncated one is an error and not grey
    upright = ImageOps.exif_transpose(image)
    return square_rgb(upright, size), SourceInfo(upright.width, upright.height, codec, None, 1)


def square_rgb(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """A picture as RGB of shape [size, size, 3], whatever its aspect ratio, upright by its EXIF orientation.

    Grey, CMYK, palette and 16-bit pictures become RGB; transparent parts are put on white.
    """
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray((grey * 255 // 65535).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
