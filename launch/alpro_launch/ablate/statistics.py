"""Means over seeds, differences by seed, and how many seeds a difference would need: pure functions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

_NORMAL = NormalDist()
_LEVEL, _POWER = 0.05, 0.8
# Above it, the normal distribution gives the same number of seeds.
_MOST_EXACT = 1000
_NUM_INTERVALS = 800


class Spread(NamedTuple):
    """Of values over seeds.

    Attributes:
        mean: None without a value.
        sd: standard deviation of a sample (n - 1); None with fewer than two values.
    """

    mean: float | None
    sd: float | None


class Paired(NamedTuple):
    """Differences of two rows, seed by seed.

    Attributes:
        differences: by seed, of the seeds that both rows have.
        mean: of them.
        sd: of them.
        same_sign: whether all are above 0, or all below; None with fewer than two.
        seeds_needed: see `seeds_needed`; None where nothing can be said.
    """

    differences: dict[int, float]
    mean: float | None
    sd: float | None
    same_sign: bool | None
    seeds_needed: int | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of values over seeds."""
    return Spread(
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def paired(row: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """Row minus baseline.

    Args:
        row: values by seed.
        baseline: values by seed; seeds that only one of the two has are left out.
    """
    differences = {seed: value - baseline[seed] for seed, value in row.items() if seed in baseline}
    mean, sd = spread(list(differences.values()))
    if mean is None or sd is None:
        return Paired(differences, mean, sd, None, None)
    signs = {math.copysign(1, value) if value else 0 for value in differences.values()}
    return Paired(differences, mean, sd, len(signs) == 1 and signs != {0}, seeds_needed(mean, sd))


def seeds_needed(mean: float, sd: float) -> int | None:
    """Seeds with which a paired t test finds a difference at the two-sided 5 % level with a probability of 80 %.

    The smallest n at which P(|T| > t) >= 0.8, with T of the noncentral t distribution with n - 1 degrees of freedom and
    noncentrality sqrt(n) mean / sd (Cohen 1988, chapter 2); mean and sd are taken as if they were known exactly.

    Args:
        mean: of the differences.
        sd: of the differences.

    Returns:
        At least 2; None where the mean is 0.
    """
    if not mean:
        return None
    if not sd:
        return 2
    effect = abs(mean) / sd
    # What the normal distribution needs; the t test never needs fewer.
    num = ((_NORMAL.inv_cdf(1 - _LEVEL / 2) + _NORMAL.inv_cdf(_POWER)) / effect) ** 2
    if num > _MOST_EXACT:
        return math.ceil(num) if math.isfinite(num) else None
    seeds = max(2, math.ceil(num))
    while power(effect, seeds) < _POWER:
        seeds += 1
    return seeds


def power(effect: float, num_seeds: int) -> float:
    """Probability that a two-sided paired t test at the 5 % level finds a difference.

    Args:
        effect: mean of the differences over their standard deviation.
        num_seeds: at least 2.
    """
    degrees = num_seeds - 1
    return _exceeds(critical_t(degrees), degrees, effect * math.sqrt(num_seeds))


@cache
def critical_t(degrees: int) -> float:
    """What |T| of a t distribution exceeds with a probability of 5 %."""
    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _exceeds(middle, degrees, 0.0) > _LEVEL else (low, middle)
    return high


def _exceeds(limit: float, degrees: int, noncentrality: float) -> float:
    """P(|T| > limit) by Simpson's rule: T = (Z + noncentrality) / S, S the root of a chi-square over its degrees."""
    width = 10 / math.sqrt(2 * degrees)
    start, end = max(0.0, 1 - width), 1 + width
    step = (end - start) / _NUM_INTERVALS
    total = 0.0
    for index in range(_NUM_INTERVALS + 1):
        s = start + index * step
        weight = 1 if index in (0, _NUM_INTERVALS) else 4 if index % 2 else 2
        beyond = _NORMAL.cdf(noncentrality - limit * s) + _NORMAL.cdf(-noncentrality - limit * s)
        total += weight * _density(s, degrees) * beyond
    return total * step / 3


def _density(s: float, degrees: int) -> float:
    """Of the root of a chi-square over its degrees of freedom."""
    if s == 0:
        return math.sqrt(2 / math.pi) if degrees == 1 else 0.0
    half = degrees / 2
    return math.exp(
        math.log(2) + half * math.log(half) - math.lgamma(half) + (degrees - 1) * math.log(s) - half * s * s
    )
