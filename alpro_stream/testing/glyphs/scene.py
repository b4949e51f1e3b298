"""What happens in a clip: objects, their places and movements. Pure functions of random draws; no pixels, no words."""

from collections.abc import Callable, Sequence
from math import inf
from random import Random
from typing import Literal, Self

from pydantic import Field, model_validator

from alpro_stream.config import Config
from alpro_stream.testing.glyphs.vocabulary import CORNERS, STEPS, Corner, Direction

GRID = 4
"""Cells along one side of a frame."""
NUM_FRAMES = 16
Place = tuple[float, float]
"""Row and column of a top left corner, in cells."""
_FIRST_SEEN = ((0, 4), (6, 10))
_FRAMES_SHOWN = 6


class SceneConfig(Config):
    """What may happen in a clip."""

    num_movers: Literal[1, 2] = 2
    """Objects that move: the second starts where the first stops. One alone moves all the time."""
    with_corner: bool = True
    """An object that stands still in one of the corners."""
    presence: Literal["always", "enter_and_leave"] = "always"
    """Movers are there all the time, or for six frames each, one after the other, in whole cells."""
    kept: tuple[float, ...] = (0.25, 0.35, 0.40)
    """Weights with which a training clip shows 1, 2 or all 3 of the objects; held-out clips show all. Those of more
    objects than there are count for nothing."""
    path_cells: int = Field(default=2, ge=1, le=GRID - 1)
    """Cells that a mover covers."""

    @model_validator(mode="after")
    def _kept_can_be_drawn(self) -> Self:
        weights = self.kept[: self.num_movers + self.with_corner]
        if not weights or min(weights) < 0 or not 0 < sum(weights) < inf:
            raise ValueError(f"kept {list(self.kept)}: expected weights of 1, 2 and 3 objects, not negative, not all 0")
        return self


class Thing(Config):
    """An object: numbers of its noun and of its colour."""

    noun: int
    colour: int


class Mover(Config):
    """An object that moves.

    Rows and columns are cells. It moves from the first frame on until the last, and rests before and after; it is seen
    from frame `enters` on, and no longer from `leaves`.
    """

    thing: Thing
    row: int
    column: int
    direction: Direction
    path_cells: int
    first: int
    last: int
    enters: int = 0
    leaves: int = NUM_FRAMES
    snaps: bool = False

    def cells(self) -> set[tuple[int, int]]:
        """All that it passes."""
        down, right = STEPS[self.direction]
        return {(self.row + down * step, self.column + right * step) for step in range(self.path_cells + 1)}

    def place(self, frame: int) -> Place | None:
        """Row and column of its top left corner, in cells; None where it is not seen."""
        if not self.enters <= frame < self.leaves:
            return None
        gone = self.path_cells * min(1.0, max(0.0, (frame - self.first) / (self.last - self.first)))
        gone = float(round(gone)) if self.snaps else gone
        down, right = STEPS[self.direction]
        return self.row + down * gone, self.column + right * gone


class Still(Config):
    """An object in a corner."""

    thing: Thing
    corner: Corner

    def cell(self) -> tuple[int, int]:
        """Row and column."""
        vertical, horizontal = self.corner.split()
        return (0 if vertical == "top" else GRID - 1), (0 if horizontal == "left" else GRID - 1)


class Scene(Config):
    """A clip: `movers` in the order in which they move."""

    movers: tuple[Mover, ...]
    still: Still | None

    def things(self) -> list[Thing]:
        """All objects: movers, then the one in the corner."""
        return [mover.thing for mover in self.movers] + ([self.still.thing] if self.still else [])

    def places(self, frame: int) -> list[tuple[Thing, Place]]:
        """The objects that a frame shows, with row and column of their top left corners, in cells."""
        seen = [(mover.thing, place) for mover in self.movers if (place := mover.place(frame)) is not None]
        return [*seen, (self.still.thing, self.still.cell())] if self.still else seen


def boxes(scene: Scene) -> list[tuple[Thing, list[tuple[float, float, float, float] | None]]]:
    """Where each object is in every frame: (top, left, height, width) as shares of the frame; None where not seen."""
    side = 1 / GRID
    ways = [(mover.thing, [mover.place(frame) for frame in range(NUM_FRAMES)]) for mover in scene.movers]
    if scene.still:
        ways.append((scene.still.thing, [scene.still.cell()] * NUM_FRAMES))
    return [
        (thing, [(place[0] * side, place[1] * side, side, side) if place else None for place in places])
        for thing, places in ways
    ]


DrawThings = Callable[[Random, int], Sequence[Thing]]
"""Draws so many objects with different nouns; the first of them is a mover's."""


def draw_scene(random: Random, config: SceneConfig, draw_things: DrawThings, complete: bool) -> Scene:
    """Draws a clip.

    Args:
        random: of this clip.
        config: what may happen.
        draw_things: draws the objects.
        complete: all objects are kept, as in held-out clips.
    """
    things = draw_things(random, config.num_movers + config.with_corner)
    still = Still(thing=things[-1], corner=random.choice(CORNERS)) if config.with_corner else None
    taken = {still.cell()} if still else set[tuple[int, int]]()
    movers = list[Mover]()
    while len(movers) < config.num_movers:
        mover = _draw_mover(random, config, things[len(movers)], number=len(movers))
        if mover is None or mover.cells() & taken:
            # A first path may leave no room for the second.
            taken, movers = ({still.cell()} if still else set()), []
            continue
        taken |= mover.cells()
        movers.append(mover)
    if complete:
        return Scene(movers=tuple(movers), still=still)
    slots: list[Mover | Still] = [*movers, *([still] if still else [])]
    weights = config.kept[: len(slots)]
    number = random.choices(range(1, len(weights) + 1), weights)[0]
    kept = random.sample(range(len(slots)), number)
    return Scene(
        movers=tuple(mover for index, mover in enumerate(movers) if index in kept),
        still=still if still and len(slots) - 1 in kept else None,
    )


def _draw_mover(random: Random, config: SceneConfig, thing: Thing, number: int) -> Mover | None:
    """None where the path leaves the frame."""
    direction = random.choice(tuple(STEPS))
    row, column = random.randrange(GRID), random.randrange(GRID)
    down, right = STEPS[direction]
    last_row, last_column = row + down * config.path_cells, column + right * config.path_cells
    if not (0 <= last_row < GRID and 0 <= last_column < GRID):
        return None
    timing: dict[str, int | bool]
    if config.presence == "enter_and_leave":
        enters = random.randint(*_FIRST_SEEN[number])
        leaves = enters + _FRAMES_SHOWN
        timing = {"first": enters, "last": leaves - 1, "enters": enters, "leaves": leaves, "snaps": True}
    elif config.num_movers == 1:
        timing = {"first": 0, "last": NUM_FRAMES - 1}
    else:
        half = NUM_FRAMES // 2
        timing = {"first": half * number, "last": half * number + half - 1}
    place = {"thing": thing, "row": row, "column": column, "direction": direction, "path_cells": config.path_cells}
    return Mover.model_validate({**place, **timing})
