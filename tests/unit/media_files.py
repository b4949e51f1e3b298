"""Small real media files for tests: each frame is one flat grey, so a decoded frame says which one it is."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

GREY_STEP = 4


def grey_of(index):
    return 8 + GREY_STEP * index


def index_of(frame):
    """Which frame of a file written by `write_video` this is."""
    return round((float(frame.mean()) - 8) / GREY_STEP)


def write_video(path, times_ms, *, codec="libx264", width=64, height=48, pixels=None):
    """A video whose frame i is displayed from ``times_ms[i]``; `pixels` replaces the flat grey frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            stream.options = {"crf": "4", "preset": "ultrafast", "bf": "2", "g": "10"}
        for index, time_ms in enumerate(times_ms):
            picture = np.full((height, width, 3), grey_of(index), np.uint8) if pixels is None else pixels[index]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def constant_rate(num_frames, fps):
    return [round(1000 * i / fps) for i in range(num_frames)]


def write_audio(path):
    """A tone, and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        tone = (8000 * np.sin(np.arange(1024 * 20) / 6)).astype(np.int16)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_image(path, color=(200, 30, 40), size=(40, 30)):
    Image.new("RGB", size, color).save(path)
    return Path(path)
