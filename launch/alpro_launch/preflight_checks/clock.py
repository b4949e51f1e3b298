"""How far the clocks of the machines are apart.

Nothing of the training depends on it: the order of steps is no matter of time. But lines of logs of several machines
are read side by side, times of files on a shared folder are compared, and S3 refuses requests of a clock that is wrong
by a quarter of an hour.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from alpro_launch.preflight_checks.lines import Line
from alpro_stream.train.distributed import World

_ROUNDS = 8
_MOST_S = 1.0


class Offset(NamedTuple):
    """Of a clock against that of the first rank, in seconds; the truth is within `uncertainty_s` of it."""

    seconds: float
    uncertainty_s: float


def measure_offset(world: World, leaders: Sequence[int], clock: Callable[[], float] = time.time) -> Offset | None:
    """Asks the first rank for its time, on the first rank of each other machine; None on the others. On all ranks.

    Of several questions the one with the shortest way there and back counts: the answer was given in its middle, half
    of it more or less.

    Args:
        world: the ranks.
        leaders: the first rank of each machine, of all of them the first one.
        clock: of this rank.
    """
    offset = None
    number = torch.zeros(1, dtype=torch.float64)
    with world.waiting("the clock of rank 0"):
        for leader in leaders[1:]:
            if world.rank == leader:
                offset = min((_ask(world, number, clock) for _ in range(_ROUNDS)), key=lambda one: one.uncertainty_s)
            elif world.is_first:
                for _ in range(_ROUNDS):
                    dist.recv(number, leader, group=world.control)
                    number[0] = clock()
                    dist.send(number, leader, group=world.control)
    return offset


def _ask(world: World, number: torch.Tensor, clock: Callable[[], float]) -> Offset:
    asked = clock()
    dist.send(number, 0, group=world.control)
    dist.recv(number, 0, group=world.control)
    answered = clock()
    return Offset((asked + answered) / 2 - number.item(), (answered - asked) / 2)


def judge_offsets(found: Sequence[Offset | None], hosts: Sequence[str]) -> list[Line]:
    """One line, of the clock that is furthest away."""
    apart = {rank: offset for rank, offset in enumerate(found) if offset is not None}
    if not apart:
        return [Line("clocks", "one node")]
    rank, worst = max(apart.items(), key=lambda item: abs(item[1].seconds))
    text = f"{worst.seconds:+.3f} s (+- {worst.uncertainty_s:.3f}) on {hosts[rank]}, the furthest"
    against = f"{hosts[0]}, at most {_MOST_S:g} s"
    if abs(worst.seconds) - worst.uncertainty_s <= _MOST_S:
        return [Line("clocks", text, against)]
    remedy = "set the clock (chrony, NTP): times in logs and of files cannot be compared else"
    return [Line("clocks", text, against, "warn", remedy, "hardware")]
