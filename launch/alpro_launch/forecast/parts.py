"""The parts of a machine that `benchmarks/forecast.py` measures one by one, as rows of its results and back."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from alpro_launch.forecast.collectives import Links
from alpro_launch.forecast.rates import MeasuredRates

_ROW = re.compile(r"part, (\d+) ranks?: (.+)")
_PRODUCT = re.compile(r"product, width (\d+)")
FRAME_SIZE = 96
"""Side in pixels of the stored frame whose decoding is measured."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a rank does beside others of the same machine.

    Attributes:
        rates: of forward, backward and labels.
        update_s: of AdamW, for a parameter.
        update_tensor_s: of AdamW, for a tensor of parameters.
        frame_s: to decode a stored frame of `FRAME_SIZE`, of a core.
        rest_s: of a step, beside all that is forecast.
        links: to the others; None of one rank.
    """

    rates: MeasuredRates
    update_s: float
    update_tensor_s: float
    frame_s: float
    rest_s: float
    links: Links | None = None


def rows_of(parts: Parts, num_ranks: int) -> list[tuple[str, float, str]]:
    """Name, value and unit of each part."""
    rates = parts.rates
    rows = [(f"product, width {width}", per_s / 1e9, "GFLOP/s") for width, per_s in sorted(rates.products.items())]
    rows += [
        # By the byte and not a second: what costs nothing is a number then too.
        ("other operations", 1e9 / rates.bytes_per_s, "s/GB"),
        ("start of an operation", rates.call_s * 1e6, "us"),
        ("update", parts.update_s * 1e9, "ns/parameter"),
        ("update of a tensor", parts.update_tensor_s * 1e6, "us"),
        ("decoding", parts.frame_s * 1e3, "ms/frame"),
        ("rest of a step", parts.rest_s * 1e3, "ms"),
    ]
    if parts.links:
        rows += [
            ("sums", parts.links.inside_per_s / 1e9, "GB/s"),
            ("start of a collective", parts.links.latency_s * 1e6, "us"),
        ]
    ranks = f"part, {num_ranks} rank{'' if num_ranks == 1 else 's'}"
    return [(f"{ranks}: {name}", value, unit) for name, value, unit in rows]


def parts_of(rows: Iterable[Mapping[str, Any]]) -> dict[int, Parts]:
    """By number of ranks, what rows of results say; rows of another kind are passed over.

    Raises:
        KeyError: a part is missing, or below nothing; a rate is nothing.
    """
    by_ranks: dict[int, dict[str, float]] = {}
    for row in rows:
        if found := _ROW.fullmatch(row["name"]):
            by_ranks.setdefault(int(found[1]), {})[found[2]] = float(row["value"])
    return {num_ranks: _parts(values) for num_ranks, values in sorted(by_ranks.items())}


def _parts(values: Mapping[str, float]) -> Parts:
    for name, value in values.items():
        if value < 0 or (value == 0 and (name == "sums" or _PRODUCT.fullmatch(name))):
            raise KeyError(name)
    products = {int(found[1]): value * 1e9 for name, value in values.items() if (found := _PRODUCT.fullmatch(name))}
    if not products:
        raise KeyError("product")
    per_gb = values["other operations"]
    links = None
    if "sums" in values:
        per_s = values["sums"] * 1e9
        links = Links(per_s, per_s, values["start of a collective"] / 1e6)
    return Parts(
        MeasuredRates(products, 1e9 / per_gb if per_gb > 0 else float("inf"), values["start of an operation"] / 1e6),
        values["update"] / 1e9,
        values["update of a tensor"] / 1e6,
        values["decoding"] / 1e3,
        values["rest of a step"] / 1e3,
        links,
    )
