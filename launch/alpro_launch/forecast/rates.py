"""How long a machine takes for work: by a share of its peak that is assumed, or by rates that were measured on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alpro_launch.forecast.work import Work


class Rates(Protocol):
    """What turns work into seconds."""

    def seconds(self, work: Work, width: int) -> float:
        """Of work whose matrix products are about `width` wide."""
        ...

    def waits_for_calls(self, work: Work, width: int) -> bool:
        """Whether starting the operations takes most of it."""
        ...


@dataclass(frozen=True, slots=True)
class AssumedRates:
    """Of a GPU from the table, which works behind the program that starts its operations.

    Attributes:
        peak_per_s: floating point operations a second at best.
        share: of the peak that matrix products reach; of a whole step where `bytes_per_s` is infinite.
        bytes_per_s: read and written by all other operations.
        call_s: to start one operation.
    """

    peak_per_s: float
    share: float
    bytes_per_s: float
    call_s: float

    def seconds(self, work: Work, width: int) -> float:
        """The longer of computing and starting: whoever is ahead waits for the other."""
        return max(self._computing_s(work), work.calls * self.call_s)

    def waits_for_calls(self, work: Work, width: int) -> bool:
        """See `Rates`."""
        return work.calls * self.call_s > self._computing_s(work)

    def _computing_s(self, work: Work) -> float:
        """Products and all else, which follow each other on the device."""
        return work.flops / (self.peak_per_s * self.share) + work.num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """Of a machine on which the parts were measured one by one; they add up, as on a CPU.

    Attributes:
        products: floating point operations a second of matrix products, by their width.
        bytes_per_s: read and written by all other operations; infinite where they cost nothing.
        call_s: to start one operation.
    """

    products: Mapping[int, float]
    bytes_per_s: float
    call_s: float

    def seconds(self, work: Work, width: int) -> float:
        """Of products, of other operations, and of starting both."""
        return work.flops / rate_at(self.products, width) + work.num_bytes / self.bytes_per_s + work.calls * self.call_s

    def waits_for_calls(self, work: Work, width: int) -> bool:
        """See `Rates`."""
        return work.calls * self.call_s > self.seconds(work, width) / 2


def rate_at(products: Mapping[int, float], width: int) -> float:
    """The rate of products of a width: on a line in both logarithms between two that were measured, or the nearest."""
    widths = sorted(products)
    if width <= widths[0] or width >= widths[-1]:
        return products[widths[0] if width <= widths[0] else widths[-1]]
    return exp(float(np.interp(log(width), np.log(widths), np.log([products[w] for w in widths]))))


def fitted_rates(products: Mapping[int, float], samples: Sequence[tuple[Work, int, float]]) -> MeasuredRates:
    """Rates of all but the products from some measured times, so that relative errors are small.

    Args:
        products: measured by themselves.
        samples: work, its width and its seconds; two or more with another mix of bytes and calls tell both apart, one
            gives the bytes alone.
    """
    rows, targets = [], []
    for work, width, seconds in samples:
        rest = seconds - work.flops / rate_at(products, width)
        rows.append([work.num_bytes / seconds, work.calls / seconds])
        targets.append(rest / seconds)
    per_byte, per_call = not_negative(np.array(rows), np.array(targets))
    return MeasuredRates(dict(products), 1 / per_byte if per_byte > 0 else float("inf"), per_call)


def not_negative(rows: NDArray[np.float64], targets: NDArray[np.float64]) -> tuple[float, float]:
    """Least squares with two unknowns that are not below zero; of one sample only the first.

    Args:
        rows: (samples, 2), what each unknown is multiplied by.
        targets: (samples,), the sums.
    """
    best, best_error = (0.0, 0.0), float(np.square(targets).sum())
    columns = ([0], [1], [0, 1]) if len(rows) > 1 else ([0],)
    for chosen in columns:
        solved = np.linalg.lstsq(rows[:, chosen], targets, rcond=None)[0]
        if (solved < 0).any():
            continue
        error = float(np.square(rows[:, chosen] @ solved - targets).sum())
        if error < best_error:
            values = dict(zip(chosen, map(float, solved), strict=True))
            best, best_error = (values.get(0, 0.0), values.get(1, 0.0)), error
    return best
