"""Every promise as one line: target, measured, limit, ratio, how to reproduce it; and why one is not kept.

The reasons are in `missed.yaml` beside this file, by benchmark and row; targets that need a GPU in `unmeasured.yaml`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REASONS = Path(__file__).with_name("missed.yaml")
UNMEASURED = Path(__file__).with_name("unmeasured.yaml")
GPU = "gpu"
_COMMANDS = {GPU: "bash benchmarks/gpu.sh"}
"""Where it is not `alpro bench`."""

Results = Mapping[str, dict[str, Any]]
"""By name of the benchmark, what it wrote."""
Reasons = Mapping[str, Mapping[str, Mapping[str, str]]]
"""By benchmark and row: `why` the target is not kept, and what would `close` the gap."""
Unmeasured = Mapping[str, Any]
"""Rows with a target that need a GPU, `why` they are not measured, and what would `close` that."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A row of a benchmark that has a target, measured or not.

    Attributes:
        benchmark: its name.
        row: its name there.
        target: such as ``>= 0.8 of the limit``.
        measured: value with its unit; ``-`` where it was not measured.
        spread: interquartile range over the value, in percent; empty where there is none.
        limit: what was reached there and then without us, and what that is; empty where there is none.
        ratio: value over limit; None without a limit.
        kept: whether the target was; None where it was not measured.
    """

    benchmark: str
    row: str
    target: str
    measured: str
    spread: str
    limit: str
    ratio: float | None
    kept: bool | None

    @property
    def command(self) -> str:
        """What measures it again."""
        return _COMMANDS.get(self.benchmark, f"alpro bench {self.benchmark}")


def load_reasons(path: Path = REASONS) -> Reasons:
    """The texts beside the missed targets."""
    found: Reasons = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return found


def load_unmeasured(path: Path = UNMEASURED) -> Unmeasured:
    """The targets that need a GPU."""
    found: Unmeasured = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def promises(results: Results) -> list[Promise]:
    """All rows that have a target, by benchmark."""
    return [
        Promise(
            benchmark=name,
            row=row["name"],
            target=target_text(row["target"]),
            measured=f"{number(row['value'])} {row['unit']}",
            spread="" if row["spread"] is None else f"{100 * row['spread']:.0f} %",
            limit=_limit_text(row),
            ratio=row["ratio"],
            kept=bool(row["ok"]),
        )
        for name, row in rows_with(results)
    ]


def waiting(results: Results, unmeasured: Unmeasured) -> list[Promise]:
    """The targets that need a GPU, but for those that were measured on one."""
    measured = {row["name"] for name, row in rows_with(results) if name == GPU}
    return [
        Promise(
            benchmark=GPU,
            row=row["name"],
            target=target_text(row["target"]),
            measured="-",
            spread="",
            limit=f"- ({row['limit_of']})" if "limit_of" in row else "",
            ratio=None,
            kept=None,
        )
        for row in unmeasured["rows"]
        if row["name"] not in measured
    ]


def target_text(target: Mapping[str, Any]) -> str:
    """A target in signs."""
    sign, bound = (">=", target["at_least"]) if "at_least" in target else ("<=", target["at_most"])
    return f"{sign} {bound:g}" + (" of the limit" if target["of"] == "ratio" else "")


def problems(results: Results, reasons: Reasons) -> list[str]:
    """Missed targets without a reason, and reasons of what is no row with a target."""
    found = promises(results)
    known = {(one.benchmark, one.row) for one in found}
    explained = {(name, row): texts for name, rows in reasons.items() for row, texts in rows.items()}
    missing = [
        f"{one.benchmark}: {one.row}: the target is missed and {REASONS.name} does not say why and what would close it"
        for one in found
        if not one.kept and not {"why", "close"} <= explained.get((one.benchmark, one.row), {}).keys()
    ]
    stale = [f"{name}: {row}: {REASONS.name} explains what is no row with a target" for name, row in explained]
    return missing + [text for text, key in zip(stale, explained, strict=True) if key not in known]


def markdown(results: Results, reasons: Reasons, unmeasured: Unmeasured) -> str:
    """One table of all promises, and below it a line for each that is not kept."""
    measured, left = promises(results), waiting(results, unmeasured)
    more = f", {len(left)} more need a GPU and are not measured" if left else ""
    lines = [
        f"{sum(bool(one.kept) for one in measured)} of {len(measured)} targets are kept{more}.",
        "",
        "| | of the limit | measured | spread | limit | target | kept | again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_text: dict[str, list[str]] = {}
    for one in [*measured, *left]:
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        kept = {True: "yes", False: "**no**", None: "not measured"}[one.kept]
        cells = [f"{one.benchmark}: {one.row}", ratio, one.measured, one.spread, one.limit, one.target, kept]
        lines.append(f"| {' | '.join(cells)} | `{one.command}` |")
        if not one.kept:
            text = _both(unmeasured if one.kept is None else reasons.get(one.benchmark, {}).get(one.row, {}))
            found = "not measured" if one.kept is None else one.measured
            by_text.setdefault(text, []).append(f"**{one.benchmark}: {one.row}** ({one.target}, {found})")
    if by_text:
        lines += ["", "What falls short, why, and what would close it:", ""]
    return "\n".join([*lines, *(f"- {'; '.join(rows)}. {text}" for text, rows in by_text.items())])


def number(value: float | None) -> str:
    """A value with about three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _limit_text(row: Mapping[str, Any]) -> str:
    if row["limit"] is None:
        return ""
    what = row.get("limit_of")
    return number(row["limit"]) + (f" ({what})" if what else "")


def _both(texts: Mapping[str, Any]) -> str:
    def sentence(key: str) -> str:
        return " ".join(texts.get(key, "").split())

    return f"{sentence('why')} *To close it:* {sentence('close')}"


def rows_with(results: Results, *, limits: bool = False) -> Sequence[tuple[str, dict[str, Any]]]:
    """Rows with a target, with `limits` also those that have a limit, each with its benchmark's name."""
    return [
        (name, row)
        for name, result in sorted(results.items())
        for row in result.get("rows", ())
        if row["target"] or (limits and row["limit"] is not None)
    ]
