"""What the peers' users write themselves: which frames of a clip, and JPEG bytes to a tensor."""

import io
import random
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from PIL import Image

Decode = Callable[[bytes], np.ndarray]


def choose_frames(num_frames: int, num_wanted: int) -> list[int]:
    """Indices in order, one half out of each half of the clip; evenly spread where the clip is too short for that."""
    if num_frames < num_wanted:
        return [int((i + 0.5) * num_frames / num_wanted) for i in range(num_wanted)]
    middle, num_head = num_frames // 2, num_wanted // 2
    head = random.sample(range(middle), num_head)
    return sorted(head + random.sample(range(middle, num_frames), num_wanted - num_head))


def choose_crop(height: int, width: int, side: int) -> tuple[int, int]:
    """Top and left edge of a random square."""
    return random.randint(0, height - side), random.randint(0, width - side)


def pil(jpeg: bytes) -> np.ndarray:
    """Pixels (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def turbo(jpeg: bytes) -> np.ndarray:
    """Pixels (height, width, 3)."""
    return simplejpeg.decode_jpeg(jpeg)


def clip(jpegs: Sequence[bytes], side: int, decode: Decode) -> torch.Tensor:
    """The frames (frames, side, side, 3), uint8, all with the same random crop."""
    pixels = np.empty((len(jpegs), side, side, 3), np.uint8)
    for i, jpeg in enumerate(jpegs):
        frame = decode(jpeg)
        if i == 0:
            top, left = choose_crop(*frame.shape[:2], side)
        pixels[i] = frame[top : top + side, left : left + side]
    return torch.from_numpy(pixels)
