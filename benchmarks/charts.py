"""Charts of results: horizontal bars for a terminal, and as an SVG file that asks for nothing else.

Axis and numbers are those of the project's pages; the colours are in the file, for light and dark pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alpro_stream.pages.ablation_page import SpreadPlot
from alpro_stream.pages.numbers import decimal
from alpro_stream.pages.plots import Axis, nice_axis, tick_label
from alpro_stream.pages.spreads import WIDTH as SPREADS_WIDTH
from alpro_stream.pages.spreads import spread_marks

_WIDTH, _RIGHT, _TOP, _ROW, _BOTTOM, _BAR = 720, 70, 40, 26, 34, 14
# About the width of a character of a name.
_CHARACTER = 7.2
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:14px;font-weight:600}.tick{fill:#57606a}
.axis,.grid{stroke:#d0d7de}.bar{fill:#afb8c1}.ours{fill:#0969da}.limit{stroke:#cf222e;stroke-width:2}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.tick{fill:#8d96a0}.axis,.grid{stroke:#30363d}.bar{fill:#6e7681}
.ours{fill:#4493f8}.limit{stroke:#ff7b72}}
"""
_SPREADS_STYLE = """
.raw{stroke:#8c959f;stroke-width:6;stroke-linecap:round}.whisker{stroke:#0969da;stroke-width:1.5;fill:none}
.end{fill:#0969da}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One value.

    Attributes:
        name: beside it.
        value: its length; not negative.
        limit: what it is compared with, as a mark; None for no mark.
        is_ours: stands out.
    """

    name: str
    value: float
    limit: float | None = None
    is_ours: bool = False


def bar_lines(bars: Sequence[Bar], unit: str, width: int = 40) -> list[str]:
    """The bars for a terminal, one a line: full up to the limit, light beyond it; the longest has `width` signs."""
    most = max((bar.value for bar in bars), default=0.0) or 1.0
    total = sum(bar.value for bar in bars) or 1.0
    longest = max((len(bar.name) for bar in bars), default=0)
    lines = []
    for bar in bars:
        length = round(width * bar.value / most)
        within = length if bar.limit is None else min(length, round(width * bar.limit / most))
        drawn = "█" * within + "░" * (length - within)
        share = f"{100 * bar.value / total:5.1f} %"
        lines.append(f"{bar.name:<{longest}} {decimal(bar.value):>7} {unit} {share}  {drawn}".rstrip())
    return lines


def bar_chart(title: str, bars: Sequence[Bar], unit: str, limit_is: str = "") -> str:
    """The bars as an SVG document.

    Args:
        title: above them.
        bars: from top to bottom; at least one.
        unit: of all values.
        limit_is: what the marks are, where there are any.
    """
    left = round(14 + _CHARACTER * max(len(bar.name) for bar in bars))
    axis = nice_axis(0.0, max([*(bar.value for bar in bars), *(bar.limit or 0.0 for bar in bars)]))
    height = _TOP + _ROW * len(bars) + _BOTTOM
    parts = [_scale(axis, left, height, unit, limit_is), *(_bar(bar, row, axis, left) for row, bar in enumerate(bars))]
    words = "; ".join(f"{bar.name} {decimal(bar.value)} {unit}" for bar in bars)
    head = Markup('<text class="title" x="8" y="20">{}</text>').format(title)
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}"><style>{}</style>'
            "{}{}</svg>\n"
        ).format(_WIDTH, height, f"{title}: {words}", Markup(_STYLE), head, Markup("").join(parts))
    )


def spread_chart(title: str, plots: Sequence[SpreadPlot]) -> str:
    """Means with error bars, one measure below the other, as an SVG document; those without values are left out."""
    parts, top = [Markup('<text class="title" x="8" y="20">{}</text>').format(title)], _TOP
    for plot in plots:
        if drawn := spread_marks(plot):
            height, marks = drawn
            name = Markup('<text x="8" y="{}">{}</text>').format(top + 12, f"{plot.name} ({plot.unit})")
            parts += [name, Markup('<g transform="translate(0 {})">{}</g>').format(top + 16, marks)]
            top += height + _TOP
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}"><style>{}</style>'
            "{}</svg>\n"
        ).format(SPREADS_WIDTH, top, title, Markup(_STYLE + _SPREADS_STYLE), Markup("").join(parts))
    )


def _x(value: float, axis: Axis, left: int) -> float:
    return round(left + axis.fraction(value) * (_WIDTH - left - _RIGHT), 1)


def _scale(axis: Axis, left: int, height: int, unit: str, limit_is: str) -> Markup:
    bottom = height - _BOTTOM
    parts = []
    for tick in axis.ticks:
        x = _x(tick, axis, left)
        line = '<path class="grid" d="M{} {}V{}"/><text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
        parts.append(Markup(line).format(x, _TOP, bottom, x, bottom + 16, tick_label(tick)))
    note = unit + (f"; red: {limit_is}" if limit_is else "")
    parts.append(Markup('<text class="tick" x="8" y="{}">{}</text>').format(bottom + 30, note))
    return Markup("").join(parts)


def _bar(bar: Bar, row: int, axis: Axis, left: int) -> Markup:
    top = _TOP + _ROW * row + (_ROW - _BAR) / 2
    middle, end = top + _BAR - 3, _x(bar.value, axis, left)
    name = Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(left - 8, middle, bar.name)
    kind = "ours" if bar.is_ours else "bar"
    rect = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        kind, left, top, round(end - left, 1), _BAR
    )
    mark, free_from = Markup(""), end
    if bar.limit is not None:
        x = _x(bar.limit, axis, left)
        mark = Markup('<path class="limit" d="M{} {}v{}"/>').format(x, top - 3, _BAR + 6)
        # The number goes behind the mark where both would meet.
        free_from = max(end, x) if x < end + 60 else end
    value = Markup('<text x="{}" y="{}">{}</text>').format(round(free_from + 6, 1), middle, decimal(bar.value))
    return name + rect + mark + value
