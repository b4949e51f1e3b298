"""Frames as a small video that every browser plays."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray

from alpro_stream.media.scaler import SCALING

# Of one millisecond, which is WebM's own.
_TIME_BASE = Fraction(1, 1000)
_OPTIONS = {"crf": "38", "deadline": "realtime", "cpu-used": "6"}


def encode_webm(pixels_THWC: NDArray[np.uint8], times_s: Sequence[float]) -> bytes:
    """VP9 in WebM, without sound; the same bytes every time.

    Args:
        pixels_THWC: RGB, at least two frames with even sides.
        times_s: when each is shown, ascending; the last one stays as long as the others do on average.
    """
    last_s = times_s[-1] - times_s[0]
    ends_s = [*times_s[1:], times_s[-1] + last_s / (len(times_s) - 1)]
    file = io.BytesIO()
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = *pixels_THWC.shape[1:3], "yuv420p"
        context = stream.codec_context
        context.flags |= av.codec.context.Flags.frame_duration
        context.bit_rate, context.thread_count, context.time_base = 0, 1, _TIME_BASE
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for pixels_HWC, start_s, end_s in zip(pixels_THWC, times_s, ends_s, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=SCALING,
                threads=1,
            )
            frame.time_base, frame.pts = _TIME_BASE, round((start_s - times_s[0]) * 1000)
            frame.duration = max(1, round((end_s - start_s) * 1000))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
