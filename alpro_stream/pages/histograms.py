"""Histograms as inline SVG: pure functions from counts to markup, coloured by the page's style sheet."""

import math

from markupsafe import Markup

from alpro_stream.pages.numbers import exact
from alpro_stream.pages.plots import HEIGHT, WIDTH, nice_axis, tick_label
from alpro_stream.pages.shard_report import Histogram

_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 12, 26
_GAP = 2
# About the width of a character of the labels, and the least distance between two labels.
_CHARACTER, _LABEL_GAP = 6.6, 5


def histogram_plot(histogram: Histogram) -> Markup:
    """The histogram as an SVG element: bins of equal width whatever their edges, heights in proportion to the counts.

    Every bar says its range and count when the pointer rests on it. No counts at all give a sentence instead.
    """
    if not any(histogram.counts):
        return Markup('<p class="no-data">no data</p>')
    parts = [_scale(histogram), _bars(histogram), _edge_labels(histogram)]
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, _in_words(histogram), Markup("").join(parts)
    )


def bin_label(histogram: Histogram, index: int) -> str:
    """The range of a bin in words, with the unit."""
    low, high = histogram.edges[index : index + 2]
    unit = f" {histogram.unit}" if histogram.unit else ""
    if math.isinf(low):
        return f"under {high:g}{unit}"
    return f"{low:g}{unit} or more" if math.isinf(high) else f"{low:g} to {high:g}{unit}"


def bar_height(histogram: Histogram, index: int) -> float:
    """Height of a bar in the units of the picture; the highest bar fills it."""
    return round((HEIGHT - _TOP - _BOTTOM) * histogram.counts[index] / max(histogram.counts), 2)


def _x(histogram: Histogram, edge: int) -> float:
    return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * edge / len(histogram.counts), 2)


def _bars(histogram: Histogram) -> Markup:
    bars = []
    for index, number in enumerate(histogram.counts):
        left, height = _x(histogram, index), bar_height(histogram, index)
        width = round(max(_x(histogram, index + 1) - left - _GAP, 0.5), 2)
        title = f"{bin_label(histogram, index)}: {exact(number)}"
        bar = Markup('<rect class="column" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
        bars.append(bar.format(left + _GAP / 2, round(HEIGHT - _BOTTOM - height, 2), width, height, title))
    return Markup("").join(bars)


def _scale(histogram: Histogram) -> Markup:
    axis = nice_axis(0, max(histogram.counts), whole=True)
    parts = []
    for tick in axis.ticks:
        y = round(HEIGHT - _BOTTOM - axis.fraction(tick) * (HEIGHT - _TOP - _BOTTOM), 2)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{tick_label(tick)}</text>')
    return Markup("".join(parts))


def _edge_labels(histogram: Histogram) -> Markup:
    """The values between the bins, those left out that would run into the label before."""
    bottom, free_from = HEIGHT - _BOTTOM, -math.inf
    parts = [f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>']
    for index, edge in enumerate(histogram.edges):
        if math.isinf(edge):
            continue
        x, label = _x(histogram, index), f"{edge:g}" if abs(edge) < 10_000 else tick_label(edge)
        half = len(label) * _CHARACTER / 2
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        if x - half >= free_from:
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
            free_from = x + half + _LABEL_GAP
    return Markup("".join(parts))


def _in_words(histogram: Histogram) -> str:
    top = max(range(len(histogram.counts)), key=histogram.counts.__getitem__)
    most = f"most often {bin_label(histogram, top)} ({exact(histogram.counts[top])} of {exact(sum(histogram.counts))})"
    return f"{histogram.title}: {most}"
