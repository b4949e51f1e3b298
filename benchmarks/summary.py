"""One table of several results, what `alpro bench all` ends with: `python benchmarks/summary.py FILE ...`.

Rows with a target or a limit; the ratio first.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.targets import Results, number, rows_with, target_text


def summary(results: Results) -> Table:
    """The rows of all benchmarks that say something by themselves."""
    shown = Table(title="all benchmarks", title_justify="left", title_style="bold")
    shown.add_column("benchmark", no_wrap=True)
    shown.add_column("")
    for heading in ("of the limit", "value", "limit"):
        shown.add_column(heading, justify="right")
    for heading in ("unit", "the limit is", "target", "kept"):
        shown.add_column(heading)
    for name, row in rows_with(results, limits=True):
        shown.add_row(
            name,
            row["name"],
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            number(row["value"]),
            number(row["limit"]),
            row["unit"],
            row.get("limit_of", "-"),
            target_text(row["target"]) if row["target"] else "-",
            {None: "-", True: "yes", False: "NO"}[row["ok"]],
        )
    return shown


def main(files: Sequence[str]) -> None:
    """Prints the table."""
    results = {Path(file).stem: json.loads(Path(file).read_text(encoding="utf-8")) for file in files}
    Console(width=None if sys.stdout.isatty() else 200).print(summary(results))


if __name__ == "__main__":
    main(sys.argv[1:])
