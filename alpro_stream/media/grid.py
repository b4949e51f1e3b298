"""Which frames of a clip are stored: pure arithmetic on display times, exact in fractions.

A frame is displayed from its own time until the next frame's. The grid has a point every ``1 / fps`` seconds from the
clip's start, and a frame is stored when a grid point falls into the time it is displayed::

    frames   |--A--|--B--|-----C-----|-D-|        fps = 1
    grid     0     .     1     .     2     .      -> A (0), C (1), D (2); B is never on display at a grid point
"""

import math
from fractions import Fraction
from typing import Generic, TypeVar

T = TypeVar("T")


def as_written(number: float) -> Fraction:
    """A rate or a time as a fraction: 29.97 means 2997/100, not the binary number nearest to it."""
    return Fraction(number).limit_denominator(1_000_000)


def is_on_grid(shown_from: Fraction, shown_until: Fraction, rate: Fraction) -> bool:
    """Whether a grid point ``k / rate`` falls into ``[shown_from, shown_until)``; times count from the clip's start."""
    return math.ceil(max(shown_from, Fraction(0)) * rate) < shown_until * rate


class Thinning(Generic[T]):
    """Keeps at most `limit` items of a sequence of unknown length, spread evenly over all of it.

    Every ``stride``-th item is held; when twice the limit is held and one more comes, every second one is
    dropped and the stride doubles. So never more than ``2 * limit`` items are in memory.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; expected 1 or more")
        self._limit = limit
        self._stride = 1
        self._num_seen = 0
        self._held: list[T] = []

    def wants_next(self) -> bool:
        """Whether the next item would be held, so that a caller need not make it otherwise."""
        return self._num_seen % self._stride == 0

    def skip(self) -> None:
        """Counts an item that is not wanted."""
        self._num_seen += 1

    def add(self, item: T) -> None:
        """Holds a wanted item."""
        if len(self._held) == 2 * self._limit:
            # Only now, when one more is there: thinned earlier, the end of the sequence could go bare.
            self._held = self._held[::2]
            self._stride *= 2
        self._held.append(item)
        self._num_seen += 1

    def result(self) -> list[T]:
        """The items kept: all held ones, or `limit` of them from the first to the last."""
        return [self._held[index] for index in spread(len(self._held), self._limit)]


def thinned(num_items: int, limit: int) -> list[int]:
    """The indices that `Thinning` keeps of a sequence whose length is known."""
    stride = 1
    while num_items > 2 * limit * stride:
        stride *= 2
    held = range(0, num_items, stride)
    return [held[index] for index in spread(len(held), limit)]


def spread(num_items: int, limit: int) -> list[int]:
    """At most `limit` different indices below `num_items`, evenly spaced, the first and the last among them."""
    if num_items <= limit:
        return list(range(num_items))
    if limit == 1:
        return [num_items // 2]
    # Integer rounding to the nearest: no float decides which frame is stored.
    return [(2 * i * (num_items - 1) + limit - 1) // (2 * (limit - 1)) for i in range(limit)]
