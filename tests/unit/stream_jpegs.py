"""Pictures as JPEGs of every kind, for tests."""

import io

import numpy as np
from PIL import Image


def waves(width, height, number=0):
    """A picture without symmetries; colours differ, so that swapped channels show."""
    y, x = np.mgrid[:height, :width] / 12
    colours = [np.sin(x + number) + 0.1 * y, np.cos(y + 1) - 0.1 * x, np.sin(0.5 * x + y - number)]
    return Image.fromarray((127 + 60 * np.stack(colours, -1)).clip(0, 255).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def pixels_of(data):
    """By Pillow, as stored."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def frame_of(data):
    """Where its frame header begins."""
    return data.index(b"\xff\xc0")


def with_size(data, width, height):
    """The same file with another size in its header."""
    at = frame_of(data)
    return data[: at + 5] + height.to_bytes(2) + width.to_bytes(2) + data[at + 9 :]


def with_sampling(data, *factors):
    """The same file with other sampling factors in its header, one byte for each component."""
    data, at = bytearray(data), frame_of(data)
    for component, factor in enumerate(factors):
        data[at + 11 + 3 * component] = factor
    return bytes(data)


def with_segment(data, marker, contents):
    """The same file with one more segment behind its start."""
    return data[:2] + bytes([0xFF, marker]) + (len(contents) + 2).to_bytes(2) + contents + data[2:]
