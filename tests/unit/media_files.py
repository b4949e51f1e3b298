"""Small real media files for tests: each frame is one flat grey, so a decoded frame says which one it is."""

import subprocess
import sys
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


def write_video(path, times_ms, *, codec="libx264", width=64, height=48, pixels=None, options=None):
    """A video whose frame i is displayed from ``times_ms[i]``; `pixels` replaces the flat grey frames.

    H.264 has two B-frames between others and a key frame every ten frames, unless `options` says otherwise.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            stream.options = {"crf": "4", "preset": "ultrafast", "bf": "2", "g": "10", **(options or {})}
        for index, time_ms in enumerate(times_ms):
            picture = np.full((height, width, 3), grey_of(index), np.uint8) if pixels is None else pixels[index]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_flat(path, planes, *, pix_fmt="yuv420p", codec="libx264", options=None, num_frames=1, **tags):
    """A video of flat frames with the given code values of Y, Cb and Cr; `tags` are set on the encoder."""
    width, height = tags.pop("size", (64, 64))
    frame = av.VideoFrame(width, height, pix_fmt)
    for plane, value in zip(frame.planes, planes, strict=True):
        code = np.array(value, "<u2" if "10le" in pix_fmt else np.uint8)
        plane.update(np.full(plane.buffer_size // code.itemsize, code).tobytes())
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0"} if options is None else options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            if hasattr(frame, name):
                setattr(frame, name, value)
        for index in range(num_frames):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def cut_by_edit_list(path, num_ticks):
    """Makes a MP4 file start later: its edit list then cuts off frames that stay in the file."""
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 4
    assert data[start : start + 8] == b"\0\0\0\0\0\0\0\1", "expected a list of one edit, version 0"
    media_time = int.from_bytes(data[start + 12 : start + 16], "big") + num_ticks
    data[start + 12 : start + 16] = media_time.to_bytes(4, "big")
    path.write_bytes(data)


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


def peak_memory_mb(call, path):
    """Most memory that a process of its own had which made the call, a Python expression of `file`."""
    script = (
        "import re, sys\n"
        "from alpro_stream.media import *\n"
        f"with open_media(sys.argv[1]) as file:\n    {call}\n"
        # Not what getrusage says: that includes the process it was started from.
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024
