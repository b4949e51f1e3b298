"""How numbers are written and ordered on a page, and the chance level of retrieval."""

import math
from collections.abc import Iterable

from alpro_stream.pages.report import RetrievalScore

NOT_MEASURED = "not measured"
# Keeps a number and its unit on one line.
_SPACE = "\u00a0"


def count(number: int) -> str:
    """A count: all digits up to a million, three significant ones with M or B above."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if abs(number) >= size:
            amount = number / size
            digits = f"{amount:.3g}" if abs(amount) < 999.5 else f"{amount:,.0f}"
            return f"{digits}{_SPACE}{letter}"
    return f"{number:,}"


def exact(number: int) -> str:
    """A count with all its digits, for tables that have to add up."""
    return f"{number:,}"


def decimal(value: float | None) -> str:
    """A measured value with about three significant digits, without exponents where they can be avoided."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 or size == 0 else 5}f}"


def rank(value: float) -> str:
    """A rank, which may lie between two places."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def percent(fraction: float | None, digits: int = 1, unit: bool = True) -> str:
    """A fraction as per cent, without the sign where a column's heading says it."""
    if fraction is None:
        return NOT_MEASURED
    if not math.isfinite(fraction):
        return "not finite"
    return f"{100 * fraction:.{digits}f}{_SPACE + '%' if unit else ''}"


def data_size(num_bytes: float) -> str:
    """A size in decimal units, with three significant digits."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(num_bytes) < 999.5:
            break
        num_bytes, unit = num_bytes / 1000, larger
    digits = f"{num_bytes:.3g}" if abs(num_bytes) < 999.5 else f"{num_bytes:,.0f}"
    return f"{digits}{_SPACE}{unit}"


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 59.95:
        return f"{seconds:.1f}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    return f"{minutes // 60:,}{_SPACE}h {minutes % 60}{_SPACE}min"


def shorten(text: str, length: int = 120) -> str:
    """The beginning of a text, for alternative texts and summaries."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "\u2026"


def most_frequent_first(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Names and counts in an order that does not depend on how they were gathered."""
    return sorted(counts, key=lambda item: (-item[1], item[0]))


def chance_level(num_candidates: int, num_right: int = 1) -> RetrievalScore | None:
    """What a random order of the candidates gives; None where there is nothing to rank.

    The rank of a query is that of its best right answer, so with `num_right` of `num_candidates` right,
    P(rank > k) = C(candidates - right, k) / C(candidates, k) and the mean is (candidates + 1) / (right + 1).
    """
    if not 1 <= num_right <= num_candidates:
        return None

    def hit(k: int) -> float:
        k = min(k, num_candidates)
        return 1 - math.comb(num_candidates - num_right, k) / math.comb(num_candidates, k)

    return RetrievalScore(
        name="chance",
        recall_at_1=hit(1),
        recall_at_5=hit(5),
        recall_at_10=hit(10),
        median_rank=_median_rank(num_candidates, num_right),
        mean_rank=(num_candidates + 1) / (num_right + 1),
    )


def _median_rank(num_candidates: int, num_right: int) -> float:
    """Middle of the ranks that split the distribution of the best right answer in half."""
    miss = 1.0
    lower = None
    for place in range(1, num_candidates + 1):
        miss *= max(num_candidates - num_right - place + 1, 0) / (num_candidates - place + 1)
        if lower is None and miss <= 0.5 + 1e-12:
            lower = place
        if miss < 0.5 - 1e-12:
            return ((lower or place) + place) / 2
    return float(num_candidates)
