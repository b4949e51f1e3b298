"""Line plots as inline SVG: pure functions from numbers to markup, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from alpro_stream.pages.numbers import decimal
from alpro_stream.pages.report import LossCurve

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 54, 12, 26
_MOST_DOTS = 400
_MOST_LINE_POINTS = 300


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, and those that get a label."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def fraction(self, value: float) -> float:
        """Where a value lies between the two ends, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def finite(values: Sequence[float]) -> list[float]:
    """The values that can be drawn."""
    return [value for value in values if math.isfinite(value)]


def nice_axis(low: float, high: float, num_ticks: int = 4, whole: bool = False) -> Axis:
    """An axis over [low, high] with ticks at 1, 2 or 5 times a power of ten.

    Args:
        low: smallest value shown.
        high: largest value shown; next to `low` gives a range around it.
        num_ticks: about how many ticks.
        whole: keep the ends as they are and put ticks at whole numbers only (steps).
    """
    # Closer together than this, ticks would differ by less than a float can tell.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = 1.0 if whole else abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 1e-300 else 1e-300
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= rough * 0.8), default=10)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step) if whole else math.floor(low / step)
    last = math.floor(high / step) if whole else math.ceil(high / step)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Axis(low, high, ticks) if whole else Axis(ticks[0], ticks[-1], ticks)


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The range to show: down to zero where that costs less than half of the height."""
    low, high = min(values), max(values)
    return (0.0 if 0 < low <= high / 2 else low), high


def smooth_at(values: Sequence[float], index: int, half: int) -> float:
    """Mean of the finite values at most `half` places from `index`; nan if there are none."""
    near = finite(values[max(0, index - half) : index + half + 1])
    return math.fsum(value / len(near) for value in near) if near else math.nan


def half_window(curve: LossCurve) -> int:
    """Half of a moving window of a tenth of the series; a short series is drawn as it is."""
    return len(curve.values) // 20 if curve.smooth else 0


def spread_evenly(num_values: int, most: int) -> list[int]:
    """At most `most` indices over the whole series, first and last included."""
    if num_values <= most:
        return list(range(num_values))
    return [round(place * (num_values - 1) / (most - 1)) for place in range(most)]


def smooth_line(curve: LossCurve) -> list[list[tuple[int, float]]]:
    """The smoothed series as pieces of (index, value): a value that is not finite ends a piece."""
    values, half = curve.values, half_window(curve)
    pieces: list[list[tuple[int, float]]] = [[]]
    previous = -1
    for index in spread_evenly(len(values), _MOST_LINE_POINTS):
        if not all(map(math.isfinite, values[previous + 1 : index + 1])):
            pieces.append([])
        if math.isfinite(values[index]):
            pieces[-1].append((index, smooth_at(values, index, half)))
        previous = index
    return [piece for piece in pieces if piece]


def final_value(curve: LossCurve) -> float | None:
    """Where the smoothed line ends; None without a finite value."""
    pieces = smooth_line(curve)
    return pieces[-1][-1][1] if pieces else None


def loss_plot(curve: LossCurve) -> Markup:
    """The curve as an SVG element: raw values faint, the smoothed line strong, its last value labelled."""
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    if not points:
        return Markup('<p class="no-data">no data</p>')
    levels = [value for _, value in points]
    if curve.reference is not None and math.isfinite(curve.reference):
        levels.append(curve.reference)
    frame = _Frame(nice_axis(min(curve.steps), max(curve.steps), whole=True), nice_axis(*value_range(levels)))
    parts = [frame.axes(), frame.reference(curve), frame.dots(points), frame.lines(curve)]
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, _in_words(curve, points), Markup("").join(parts)
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area: turns steps and values into positions, and draws in them."""

    step_axis: Axis
    value_axis: Axis

    def x(self, step: float) -> float:
        return round(_LEFT + self.step_axis.fraction(step) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - _BOTTOM - self.value_axis.fraction(value) * (HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self) -> Markup:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        parts = []
        for tick in self.value_axis.ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{tick_label(tick)}</text>')
        for tick in self.step_axis.ticks:
            x = self.x(tick)
            parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick_label(tick)}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
        parts.append(f'<text class="tick" x="{WIDTH}" y="{bottom + 18}" text-anchor="end">step</text>')
        return Markup("".join(parts))

    def reference(self, curve: LossCurve) -> Markup:
        if curve.reference is None or not math.isfinite(curve.reference):
            return Markup("")
        y = self.y(curve.reference)
        label_y = y - 5 if y > _TOP + 14 else y + 14
        line = f'<path class="reference" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>'
        label = f'<text class="tick level" x="{WIDTH - _RIGHT}" y="{label_y}" text-anchor="end">'
        return Markup(line + label) + escape(curve.reference_label) + Markup("</text>")

    def dots(self, points: Sequence[tuple[int, float]]) -> Markup:
        # One path of zero-length strokes with round ends is far smaller than a circle for every value.
        chosen = [points[index] for index in spread_evenly(len(points), _MOST_DOTS)]
        path = "".join(f"M{self.x(step)} {self.y(value)}h0" for step, value in chosen)
        return Markup(f'<path class="raw" d="{path}"/>')

    def lines(self, curve: LossCurve) -> Markup:
        pieces = [
            [(self.x(curve.steps[index]), self.y(value)) for index, value in piece] for piece in smooth_line(curve)
        ]
        path = "".join("M" + "L".join(f"{x} {y}" for x, y in piece) for piece in pieces if len(piece) > 1)
        x, y = pieces[-1][-1]
        label = decimal(final_value(curve))
        return Markup(
            f'<path class="smooth" d="{path}"/><circle class="end" cx="{x}" cy="{y}" r="3.5"/>'
            f'<text class="final" x="{x + 8}" y="{y + 4}">{label}</text>'
        )


def tick_label(value: float) -> str:
    """A value beside an axis, as short as can be."""
    if abs(value) >= 1000 and value == int(value) and abs(value) < 1e15:
        for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
            if abs(value) >= size:
                return f"{value / size:g}{letter}"
    return _short(f"{value:.6g}" if abs(value) >= 1e-3 else f"{value:.3e}")


def _short(number: str) -> str:
    """Drops the padding of an exponent: 4.000e-04 is 4e-4."""
    mantissa, letter, exponent = number.partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if letter and float(mantissa) else f"{float(number):g}"


def _in_words(curve: LossCurve, points: Sequence[tuple[int, float]]) -> str:
    (first_step, first), (last_step, _) = points[0], points[-1]
    last = decimal(final_value(curve))
    name = f"{curve.stage}, {curve.name}"
    if len(points) == 1:
        return f"{name}: {last} at step {last_step}"
    return f"{name}: from {decimal(first)} at step {first_step} to {last} at step {last_step}"
