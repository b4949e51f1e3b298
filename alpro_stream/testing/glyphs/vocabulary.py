"""Nouns with their glyphs, and colours."""

from functools import cache
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_ANIMALS = """
dog cat horse cow pig sheep goat duck frog snake lion tiger crab wolf fox rabbit mouse deer camel zebra monkey turtle
"""
_VEHICLES = """
car truck bus train boat plane bike tractor tank ship rocket scooter van tram canoe jeep
"""
_THINGS = """
ball star heart moon sun tree flower chair table lamp cup fork brush bell hat shoe clock book kite bowl bottle hammer
ladder rope vase
"""


def _in_turns(*groups: str) -> tuple[str, ...]:
    """So that few nouns are some of each group."""
    words = [group.split() for group in groups]
    longest = max(map(len, words))
    return tuple(group[number] for number in range(longest) for group in words if number < len(group))


NOUNS = _in_turns(_ANIMALS, _VEHICLES, _THINGS)
"""Words that the default tagger takes for nouns in every caption; each has a glyph of its own."""
ANIMALS = frozenset(_ANIMALS.split())
"""Those that questions ask for by "who"."""
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 50),
    "pink": (250, 130, 200),
    "white": (245, 245, 245),
}
"""Names of colours, and red, green and blue."""

Direction = Literal["left", "right", "up", "down"]
STEPS: dict[Direction, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns that a movement goes by."""
Corner = Literal["top left", "top right", "bottom left", "bottom right"]
CORNERS: tuple[Corner, ...] = ("top left", "top right", "bottom left", "bottom right")

GLYPH_SIDE = 7
TILE_SIDE = 8
"""Dots along one side of a glyph, and of the cell it stands in."""
_SEED = 20220617
_FEWEST_LIT, _MOST_LIT = 20, 34
_LEAST_DISTANCE = 14


@cache
def glyphs() -> NDArray[np.bool_]:
    """The glyph of every noun, (nouns, 7, 7), in the order of `NOUNS`; they never change.

    Left and right halves mirror each other; 20 to 34 of 49 dots are lit, and any two glyphs differ in at least 14.
    """
    random, found = Random(_SEED), list[NDArray[np.bool_]]()
    while len(found) < len(NOUNS):
        half = np.array([[random.random() < 0.5 for _ in range(4)] for _ in range(GLYPH_SIDE)])
        glyph = np.concatenate([half, half[:, 2::-1]], axis=1)
        far = all((glyph != other).sum() >= _LEAST_DISTANCE for other in found)
        if _FEWEST_LIT <= glyph.sum() <= _MOST_LIT and far:
            found.append(glyph)
    return np.stack(found)
