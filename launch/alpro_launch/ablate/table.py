"""From the figures of all runs to the table: pure functions and plain values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alpro_launch.ablate.config import AblateConfig, Measure
from alpro_launch.ablate.jobs import Job
from alpro_launch.ablate.schedule import State, fate
from alpro_launch.ablate.statistics import Paired, Spread, paired, spread
from alpro_stream.errors import ConfigError

_NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Cell:
    """A measure of a row.

    Attributes:
        values: by seed, of the runs that gave one.
        missing: why the others gave none, by seed.
        mean: of the values.
        sd: of them.
    """

    values: Mapping[int, float]
    missing: Mapping[int, str]
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Comparison:
    """A row minus another one, seed by seed, in one measure."""

    row: str
    baseline: str
    measure: Measure
    paired: Paired


@dataclass(frozen=True)
class Table:
    """What an ablation has shown so far.

    Attributes:
        seeds: columns of the differences.
        measures: columns of the table.
        cells: by row, then by name of the measure.
        comparisons: of the rows with those that are baselines.
        chosen: the row with the largest mean of `choose` among those with all seeds; empty while runs are missing.
        choose: name of that measure; empty without one.
    """

    seeds: tuple[int, ...]
    measures: tuple[Measure, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    comparisons: tuple[Comparison, ...]
    chosen: str
    choose: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        values = asdict(self)
        values["measures"] = [measure.model_dump() for measure in self.measures]
        values["comparisons"] = [
            {"row": one.row, "baseline": one.baseline, "measure": one.measure.name, **one.paired._asdict()}
            for one in self.comparisons
        ]
        return values


def make_table(
    config: AblateConfig,
    jobs: Sequence[Job],
    found: Mapping[Job, State],
    result_of: Callable[[Job], Mapping[str, Any]],
    with_held_back: bool,
) -> Table:
    """The table as far as jobs are done.

    Args:
        config: of the ablation.
        jobs: all of them.
        found: how far they are.
        result_of: the `result.json` of a job that is done.
        with_held_back: whether measures of stages that are held back are shown.

    Raises:
        ConfigError: a result has no such figure.
    """
    by_place = {(job.row, job.stage, job.seed): job for job in jobs}
    shown = [m for m in config.measures if with_held_back or not config.stages[m.stage].held_back]
    rows = [row.name for row in config.all_rows()]

    def cell(row: str, measure: Measure) -> Cell:
        values, missing = {}, {}
        for seed in config.seeds:
            job = by_place[row, measure.stage, seed]
            reason = fate(job, found)
            value = None if reason else figure(result_of(job), measure)
            if value is not None and math.isfinite(value):
                values[seed] = value
            else:
                missing[seed] = reason or f"{_NOT_FINITE} in {measure.stage}"
        return Cell(values, missing, *spread(list(values.values())))

    cells = {row: {measure.name: cell(row, measure) for measure in shown} for row in rows}
    compare = config.compare
    compared = [m for m in shown if compare and (not compare.measures or m.name in compare.measures)]
    return Table(
        seeds=config.seeds,
        measures=tuple(shown),
        cells=cells,
        comparisons=tuple(
            Comparison(row, baseline, m, paired(cells[row][m.name].values, cells[baseline][m.name].values))
            for m in compared
            for number, baseline in enumerate(compare.baselines if compare else ())
            for row in rows
            if compare and row not in compare.baselines[: number + 1]
        ),
        chosen=_largest({row: cells[row][config.choose] for row in rows}) if config.choose else "",
        choose=config.choose or "",
    )


def figure(result: Mapping[str, Any], measure: Measure) -> float:
    """The figure of a measure in a result.

    Raises:
        ConfigError: there is none; what there is is named.
    """
    node: Any = result
    for part in measure.key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            there = (
                f"there are {', '.join(map(str, node))}" if isinstance(node, Mapping) else "a value stands before it"
            )
            raise ConfigError(
                f"measure {measure.name!r}: the result of stage {measure.stage} has no {measure.key!r}: at {part!r} "
                f"{there}. Mend the key, then `alpro ablate CONFIG --table`"
            )
        node = node[part]
    if node is None:
        return math.nan
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise ConfigError(f"measure {measure.name!r}: {measure.key!r} of stage {measure.stage} is {node!r}, no number")
    return float(node)


def _largest(cells: Mapping[str, Cell]) -> str:
    """The row with the largest mean among those with all seeds, once no run is missing that may still come."""
    if any("not run" in cell.missing.values() for cell in cells.values()):
        return ""
    means = {row: cell.mean for row, cell in cells.items() if cell.mean is not None and not cell.missing}
    return max(means, key=lambda row: means[row], default="")


def number(value: float | None, digits: int, signed: bool = False) -> str:
    """A figure as the table shows it."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.{digits}f}"


def mean_and_sd(values: Spread, digits: int, signed: bool = False) -> str:
    """``75.7 ± 5.2``; without the second where there is one seed."""
    sd = f" ± {number(values.sd, digits)}" if values.sd is not None else ""
    return number(values.mean, digits, signed) + sd


def notes(table: Table) -> dict[tuple[str, str], str]:
    """For each row and measure that lacks seeds, a sentence on which and why."""
    found = {}
    for row, cells in table.cells.items():
        for name, cell in cells.items():
            if cell.missing:
                reasons = "; ".join(f"seed {seed} {why}" for seed, why in cell.missing.items())
                found[row, name] = f"{len(cell.values)} of {len(table.seeds)} seeds: {reasons}"
    return found
