"""The JSON and the table of a whole run, from what each piece came to; pure functions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from alpro_stream.pages.markdown import escape_markdown
from benchmarks.gpu_pieces.journal import Outcome
from benchmarks.harness import number
from benchmarks.targets import target_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a piece.

    Attributes:
        piece: its name.
        outcomes: of its parts.
        seconds: that it took.
        allowed_s: that it might have taken.
    """

    piece: str
    outcomes: Sequence[Outcome]
    seconds: float
    allowed_s: float


def result(found: Mapping[str, Any], pieces: Sequence[Done], device: str, is_quick: bool) -> dict[str, Any]:
    """The whole as plain values: what all benchmarks write, and the GPU, the tests and what was not measured.

    Args:
        found: of `environment.look`.
        pieces: in their order.
        device: ``cuda`` or ``cpu``.
        is_quick: whether figures are of toy sizes.
    """
    measured = [done for done in pieces if done.piece != "tests"]
    tests = [outcome for done in pieces if done.piece == "tests" for outcome in done.outcomes]
    return {
        "benchmark": "gpu",
        **{name: found[name] for name in ("machine", "versions", "commit", "gpu", "missing")},
        "device": device,
        "quick": is_quick,
        "rows": [{"piece": done.piece, **row} for done in measured for one in done.outcomes for row in one.rows],
        "not_measured": [
            {"piece": done.piece, "name": one.name, "state": one.state, "why": one.why}
            for done in measured
            for one in done.outcomes
            if one.state != "done"
        ],
        "tests": {
            **_counts(tests),
            "failures": [{"name": one.name, "why": one.why} for one in tests if one.state == "failed"],
            "left_out_because": dict(Counter(one.why for one in tests if one.state == "left out").most_common()),
            "figures": {one.name: one.why for one in tests if one.state == "done" and one.why},
        },
        "pieces": [
            {
                "name": done.piece,
                "seconds": round(done.seconds, 1),
                "allowed_s": round(done.allowed_s, 1),
                **_counts(done.outcomes),
            }
            for done in pieces
        ],
    }


def has_failed(pieces: Sequence[Done]) -> bool:
    """Whether anything went wrong; what is left out did not."""
    return any(outcome.state == "failed" for done in pieces for outcome in done.outcomes)


def table(values: Mapping[str, Any]) -> str:
    """A Markdown page of a `result`."""
    gpu = values["gpu"]
    device = gpu["name"] if gpu and values["device"] == "cuda" else f"the CPU, {values['machine']['cpu']}"
    lines = [f"# Measured on {escape_markdown(device)}", ""]
    if values["quick"]:
        lines += ["Toy sizes and few repetitions: to see that everything runs, nothing to quote.", ""]
    if gpu:
        driver = gpu["driver"].get("driver_version", "unknown")
        lines += [f"Driver {driver}, CUDA {gpu['cuda']}, compute capability {gpu['compute_capability']}, ", ""]
        lines[-2] += f"{gpu['memory_gib']} GiB, NCCL {gpu['nccl']}."
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    lines += [f"{versions}; commit {values['commit']}.", "", *_rows(values), "", *_tests(values["tests"]), ""]
    lines += ["| piece | seconds | of | done | failed | left out |", "|---|---|---|---|---|---|"]
    keys = ("name", "seconds", "allowed_s", "done", "failed", "left_out")
    lines += [_line([piece[key] for key in keys]) for piece in values["pieces"]]
    return "\n".join(lines) + "\n"


def _rows(values: Mapping[str, Any]) -> list[str]:
    headings = ("", "of the limit", "value", "limit", "unit", "the limit is", "spread", "target", "kept", "")
    lines = [_line(headings), "|---" * len(headings) + "|"]
    for row in values["rows"]:
        details = ", ".join(f"{name} {number(value)}" for name, value in row.get("details", {}).items())
        bound = Markup(target_text(row["target"])) if row["target"] else "-"  # its signs are no markup in a cell
        cells = [row["name"], number(row["ratio"]), number(row["value"]), number(row["limit"]), row["unit"]]
        cells.append(row.get("limit_of", "-"))
        spread = "-" if row["spread"] is None else f"{100 * row['spread']:.0f} %"
        lines.append(_line([*cells, spread, bound, {None: "-", True: "yes", False: "NO"}[row["ok"]], details]))
    for one in values["not_measured"]:
        lines.append(_line([f"{one['name']}", "-", f"{one['state']}: {one['why']}", *["-"] * 6, one["piece"]]))
    return lines


def _tests(tests: Mapping[str, Any]) -> list[str]:
    if not any(tests[state] for state in ("done", "failed", "left_out")):
        return ["The tests were not run."]
    lines = [f"Tests: {tests['done']} passed, {tests['failed']} failed, {tests['left_out']} left out."]
    for one in tests["failures"]:
        lines.append(f"- failed: {escape_markdown(one['name'])}: {escape_markdown(one['why'])}")
    for why, count in tests["left_out_because"].items():
        lines.append(f"- left out, {count}: {escape_markdown(why)}")
    for name, figures in tests["figures"].items():
        lines.append(f"- {escape_markdown(name)}: {escape_markdown(figures)}")
    return lines


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    states = Counter(outcome.state for outcome in outcomes)
    return {"done": states["done"], "failed": states["failed"], "left_out": states["left out"]}


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(escape_markdown(cell) for cell in cells)} |"
