"""Means with error bars as inline SVG: pure functions from numbers to markup, coloured by the page's style sheet."""

from markupsafe import Markup

from alpro_stream.pages.ablation_page import SpreadPlot, SpreadRow
from alpro_stream.pages.numbers import shorten
from alpro_stream.pages.plots import Axis, finite, nice_axis, tick_label, value_range

WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 480, 156, 20, 6, 30, 26
# About what fits beside the plot.
_LONGEST_NAME = 24


def spread_plot(plot: SpreadPlot) -> Markup:
    """A line for each row: its seeds as dots, their mean as a larger one, and a bar of a standard deviation each way.

    No values at all give a sentence instead.
    """
    if not (drawn := spread_marks(plot)):
        return Markup('<p class="no-data">no data</p>')
    height, marks = drawn
    words = "; ".join(f"{row.name}: {row.text}" for row in plot.rows)
    return Markup('<svg class="plot spreads" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, f"{plot.name}: {words}", marks
    )


def spread_marks(plot: SpreadPlot) -> tuple[int, Markup] | None:
    """What is inside of that SVG, `WIDTH` units wide, and its height; None where there are no values."""
    ends = [end for row in plot.rows for end in _ends(row)]
    if not ends:
        return None
    axis = nice_axis(*value_range(ends))
    height = _TOP + _ROW * len(plot.rows) + _BOTTOM
    return height, Markup("").join(
        [_scale(axis, height), *(_row(row, number, axis) for number, row in enumerate(plot.rows))]
    )


def _ends(row: SpreadRow) -> list[float]:
    """Everything that has to fit."""
    bar = [row.mean - row.sd, row.mean + row.sd] if row.mean is not None and row.sd is not None else []
    return finite([*row.values, *bar])


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.fraction(value) * (WIDTH - _LEFT - _RIGHT), 1)


def _scale(axis: Axis, height: int) -> Markup:
    bottom = height - _BOTTOM
    parts = [f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>']
    for tick in axis.ticks:
        x = _x(axis, tick)
        parts.append(f'<path class="grid" d="M{x} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick_label(tick)}</text>')
    return Markup("".join(parts))


def _row(row: SpreadRow, number: int, axis: Axis) -> Markup:
    y = _TOP + _ROW * number + _ROW / 2
    name = Markup('<text class="row" x="{}" y="{}" text-anchor="end">{}<title>{}</title></text>').format(
        _LEFT - 10, y + 4, shorten(row.name, _LONGEST_NAME), f"{row.name}: {row.text}"
    )
    seeds = "".join(f"M{_x(axis, value)} {y}h0" for value in finite(row.values))
    marks = [f'<path class="raw" d="{seeds}"/>'] if seeds else []
    if row.mean is not None:
        if row.sd is not None:
            low, high = _x(axis, row.mean - row.sd), _x(axis, row.mean + row.sd)
            marks.append(f'<path class="whisker" d="M{low} {y - 5}v10M{low} {y}H{high}M{high} {y - 5}v10"/>')
        marks.append(f'<circle class="end" cx="{_x(axis, row.mean)}" cy="{y}" r="4"/>')
    else:
        marks.append(f'<text class="tick" x="{_LEFT + 6}" y="{y + 4}">no value</text>')
    return name + Markup("".join(marks))
