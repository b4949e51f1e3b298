"""The same step on more and fewer GPUs: strong scaling shares one batch, weak scaling gives each GPU as much."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from alpro_launch.forecast.step import Layout, StepForecast

_LEAST_TOP = 64


@dataclass(frozen=True, slots=True)
class ScalingRow:
    """One number of GPUs.

    Attributes:
        num_ranks: GPUs.
        step: on so many; None where the run cannot be cut so.
        efficiency: clips a second and GPU, over those of the fewest GPUs of the table.
    """

    num_ranks: int
    step: StepForecast | None
    efficiency: float | None


def scaling(
    layout: Layout, num_lanes: int, kind: Literal["strong", "weak"], forecast: Callable[[Layout], StepForecast]
) -> list[ScalingRow]:
    """Rows for 1, 2, 4, ... GPUs, and for the number that was asked for.

    Args:
        layout: of the run.
        num_lanes: of the run; weak scaling gives every GPU the same number.
        kind: what stays: the global batch, or the batch of a GPU.
        forecast: gives the step of a layout.
    """
    rows: list[ScalingRow] = []
    first: float | None = None
    for num_ranks in rank_counts(layout.num_ranks):
        cut = cut_to(layout, num_ranks, num_lanes, kind)
        step = forecast(cut) if cut else None
        each = step.clips_per_s / num_ranks if step else None
        first = each if first is None else first
        rows.append(ScalingRow(num_ranks, step, each / first if each and first else None))
    return rows


def rank_counts(num_ranks: int) -> Sequence[int]:
    """Powers of two, up to four times the number asked for and at least 64; and that number."""
    top = max(_LEAST_TOP, 4 * num_ranks)
    powers = [2**power for power in range(top.bit_length()) if 2**power <= top]
    return sorted({*powers, num_ranks})


def cut_to(layout: Layout, num_ranks: int, num_lanes: int, kind: Literal["strong", "weak"]) -> Layout | None:
    """The run on another number of GPUs; None where its lanes do not allow it.

    With fewer lanes on a rank there are fewer micro-batches, and as many samples in each, as far as lanes can be cut.
    """
    if kind == "weak":
        return replace(layout, num_ranks=num_ranks, global_batch=round(layout.rank_batch * num_ranks))
    if num_lanes % num_ranks:
        return None
    lanes = num_lanes // num_ranks
    wanted = max(1, round(layout.num_micro_batches * layout.num_ranks / num_ranks))
    return replace(layout, num_ranks=num_ranks, num_micro_batches=gcd(lanes, wanted))
