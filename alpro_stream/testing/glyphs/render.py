"""Pixels of a scene, and the mp4 file of them."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from alpro_stream.testing.glyphs.scene import GRID, NUM_FRAMES, Place, Scene, Thing
from alpro_stream.testing.glyphs.vocabulary import COLOURS, GLYPH_SIDE, TILE_SIDE, glyphs

FRAMES_PER_S = 8
_MOST_BACKGROUND = 0.45
_NOISE = 0.08
_TEXTURE_SIDE = 5
_RGB = np.array(list(COLOURS.values()), dtype=np.float32) / 255
# Small clips would be smeared by the default, and what they show would hang on the encoder.
_OPTIONS = {"crf": "10", "preset": "veryfast", "bf": "0"}


def draw_frames(scene: Scene, cell_px: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """The frames of a clip, (16, side, side, 3), RGB.

    Objects on a background of random colours, between black and a bit less than half as bright as the objects, the same
    in all frames; grey noise over it in each. Dots of a glyph and grains of the noise have the same size.

    Args:
        scene: what is shown.
        cell_px: side of a cell in pixels, a multiple of 8: of what one object covers.
        seed: of background and noise.
    """
    return _drawn([scene.places(number) for number in range(NUM_FRAMES)], cell_px, seed)


def draw_picture(thing: Thing, place: Place, cell_px: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """One object with its corner at a row and column in cells, (side, side, 3); see `draw_frames`."""
    picture: NDArray[np.uint8] = _drawn([[(thing, place)]], cell_px, seed)[0]
    return picture


def write_mp4(path: Path, frames_THWC: NDArray[np.uint8]) -> None:
    """Writes H.264 in 4:2:0, as cameras do."""
    side = frames_THWC.shape[1]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S, options=_OPTIONS)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        # Several threads cut a frame into slices, and so change its bytes.
        stream.codec_context.thread_count = 1
        for pixels in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _drawn(shown: Sequence[Sequence[tuple[Thing, Place]]], cell_px: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    dot, side = cell_px // TILE_SIDE, GRID * cell_px
    texture = _MOST_BACKGROUND * random.random() * random.random((_TEXTURE_SIDE, _TEXTURE_SIDE, 3))
    frames = np.repeat(_stretched(texture, side)[None].astype(np.float32), len(shown), axis=0)
    for frame, things in zip(frames, shown, strict=True):
        for thing, (row, column) in things:
            _draw(frame, thing, round(row * cell_px), round(column * cell_px), dot)
    grains = random.standard_normal((len(shown), GRID * TILE_SIDE, GRID * TILE_SIDE, 1), dtype=np.float32)
    frames += _NOISE * grains.repeat(dot, axis=1).repeat(dot, axis=2)
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _draw(frame: NDArray[np.float32], thing: Thing, top: int, left: int, dot: int) -> None:
    mask = glyphs()[thing.noun].repeat(dot, axis=0).repeat(dot, axis=1)
    side = GLYPH_SIDE * dot
    frame[top : top + side, left : left + side][mask] = _RGB[thing.colour]


def _stretched(texture: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Bilinear, corner to corner."""
    at = np.linspace(0, len(texture) - 1, side)
    low = np.minimum(at.astype(int), len(texture) - 2)
    share = (at - low)[:, None, None]
    rows = texture[low] * (1 - share) + texture[low + 1] * share
    share = share.transpose(1, 0, 2)
    stretched: NDArray[np.float64] = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    return stretched
