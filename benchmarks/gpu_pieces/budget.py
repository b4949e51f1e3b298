"""How the time of the whole is divided between the pieces; pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One process of the whole.

    Attributes:
        name: of the module of `benchmarks.gpu_pieces`, or ``tests``.
        share: seconds that it should have of eight minutes.
        fewest_s: with less it is not begun.
        stall_s: longest time of one of its parts; then that part alone is given up.
    """

    name: str
    share: float
    fewest_s: float = 10.0
    stall_s: float = 60.0


PIECES = (
    Piece(name="tests", share=165, fewest_s=20, stall_s=110),
    Piece(name="limits", share=10, fewest_s=5),
    Piece(name="step", share=45),
    # Compiling the published model takes a minute or two.
    Piece(name="step_compiled", share=110, fewest_s=30, stall_s=480),
    Piece(name="prompter", share=35, stall_s=90),
    Piece(name="decode", share=25),
    Piece(name="zero", share=35),
    Piece(name="end_to_end", share=55, stall_s=120),
)
"""In their order: what other figures are divided by comes early, what takes long late."""


def allowance(left_s: float, pieces: Sequence[Piece]) -> float | None:
    """Seconds that the first of the pieces gets: its share of what is left, so what one does not use goes to the rest.

    Args:
        left_s: seconds that are left for all of them.
        pieces: those that are still to be run, at least one.

    Returns:
        None when that is too little to begin with.
    """
    first = pieces[0]
    seconds = left_s * first.share / sum(piece.share for piece in pieces)
    # The last one may have all there is, and an early one more than its share when that is too little for it.
    seconds = max(seconds, min(first.fewest_s, left_s))
    return seconds if seconds >= first.fewest_s else None
