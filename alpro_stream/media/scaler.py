"""Decoded frames as small RGB pictures."""

from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from alpro_stream.errors import MediaError
from alpro_stream.media.colour import HDR_TRANSFERS, matrix_of, primaries_of
from alpro_stream.media.container import explain
from alpro_stream.media.size import Resize, scaled_size
from alpro_stream.media.tone import tone_mapped

# Bicubic: swscale widens its kernel when it shrinks, so it does not alias, and it keeps edges that area averaging
# blurs; it is also what the ffmpeg command and the published preprocessing use. The flags make it the same on every
# CPU and give chroma its full resolution.
SCALING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Scaler:
    """Makes RGB pictures of one size rule from the frames of one video.

    It keeps swscale's tables from one frame to the next, which saves a quarter of its time.

    Args:
        size: side of the square, or the short side.
        resize: which of the two.
        pixel_aspect: width of the video's pixels by their height; None for square ones.
    """

    def __init__(self, size: int, resize: Resize, pixel_aspect: Fraction | None) -> None:
        self._size = size
        self._resize: Resize = resize
        self._pixel_aspect = pixel_aspect
        self._reformatter = VideoReformatter()

    def pixels(self, frame: Any) -> npt.NDArray[np.uint8]:
        """The frame as RGB of shape [height, width, 3], upright; HDR is tone-mapped.

        Raises:
            MediaError: a pixel format or a matrix that cannot be converted, or an aspect ratio out of bounds.
        """
        is_hdr = frame.color_trc in HDR_TRANSFERS
        width, height = scaled_size(frame.width, frame.height, self._size, self._resize, self._pixel_aspect)
        try:
            # Scaling comes before tone mapping, so that this is done on few pixels.
            small = self._reformatter.reformat(
                frame,
                width,
                height,
                "rgb48le" if is_hdr else "rgb24",
                src_colorspace=matrix_of(frame),
                interpolation=SCALING,
                threads=1,
            )
            pixels: npt.NDArray[Any] = small.to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(f"a {frame.format.name} frame cannot be converted to RGB: {explain(error)}") from error
        if is_hdr:
            pixels = tone_mapped(pixels, frame.color_trc, primaries_of(frame))
        # Scaling and turning commute, so the turn is done on the small picture.
        return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))
