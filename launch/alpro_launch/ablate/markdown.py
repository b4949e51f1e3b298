"""The table as Markdown, which is what the terminal shows too."""

from collections.abc import Sequence

from alpro_launch.ablate.config import Measure
from alpro_launch.ablate.statistics import Spread
from alpro_launch.ablate.table import Table, mean_and_sd, notes, number

POWER_NOTE = (
    "Seeds needed: with which a paired t test finds a difference of this size and spread with a probability of 80 % at "
    "the two-sided 5 % level. From few seeds it is itself a rough estimate."
)


def table_text(table: Table) -> str:
    """Means and spreads of all rows, what lacks seeds, and differences by seed."""
    mark_of: dict[str, str] = {}
    lines_of = notes(table)
    rows = []
    for row, cells in table.cells.items():
        texts = []
        for measure in table.measures:
            cell = cells[measure.name]
            note = lines_of.get((row, measure.name))
            mark = f" [{mark_of.setdefault(note, str(len(mark_of) + 1))}]" if note else ""
            texts.append(mean_and_sd(Spread(cell.mean, cell.sd), measure.digits) + mark)
        rows.append([f"{row} (chosen)" if row == table.chosen else row, *texts])
    parts = [_grid(["", *map(column_title, table.measures)], rows)]
    parts += [f"Mean ± standard deviation over the seeds {', '.join(map(str, table.seeds))}."]
    if table.chosen:
        parts += [f"Chosen: the largest mean of {table.choose}."]
    if mark_of:
        lines = ["Means of fewer seeds than asked for, which do not compare with the others:", ""]
        parts += ["\n".join([*lines, *(f"- [{mark}] {note}" for note, mark in mark_of.items())])]
    if table.comparisons:
        parts += ["Differences by seed:", _comparisons(table), POWER_NOTE]
    return "\n\n".join(parts) + "\n"


def column_title(measure: Measure) -> str:
    """Name and unit."""
    return f"{measure.name} ({measure.unit})" if measure.unit else measure.name


def comparison_cells(table: Table) -> list[list[str]]:
    """A line for each comparison: rows, measure, its seeds, mean and spread, whether the sign is one, seeds needed."""
    lines = []
    for one in table.comparisons:
        found, digits = one.paired, one.measure.digits
        sign = {None: "-", True: "yes", False: "no"}[found.same_sign]
        lines.append(
            [
                f"{one.row} − {one.baseline}",
                column_title(one.measure),
                *(number(found.differences.get(seed), digits, signed=True) for seed in table.seeds),
                mean_and_sd(Spread(found.mean, found.sd), digits, signed=True),
                sign,
                "-" if found.seeds_needed is None else str(found.seeds_needed),
            ]
        )
    return lines


def comparison_head(table: Table) -> list[str]:
    """Names of the columns of `comparison_cells`."""
    return ["", "measure", *(f"seed {seed}" for seed in table.seeds), "mean", "same sign", "seeds needed"]


def _comparisons(table: Table) -> str:
    return _grid(comparison_head(table), comparison_cells(table))


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, figures to the right."""
    texts = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *(len(row[column]) for row in texts)) for column in range(len(head))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in texts]
    rule = (
        "|"
        + "|".join("-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths))
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
