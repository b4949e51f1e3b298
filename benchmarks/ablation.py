"""Keeps the figures of finished ablations with machine and versions: `python benchmarks/ablation.py`.

Copies what `alpro ablate` wrote into `benchmarks/results/ablation`, from which `benchmarks/readme.py` makes the tables
of docs/ablation.md.
"""

import json
from pathlib import Path

from benchmarks.machine import commit, describe, versions

RUNS = Path("runs/ablate")
RESULTS = Path("benchmarks/results/ablation")


def keep(runs: Path = RUNS, results: Path = RESULTS) -> list[Path]:
    """Writes one file for each ablation that has a table; returns their paths."""
    results.mkdir(parents=True, exist_ok=True)
    written = []
    for table in sorted(runs.glob("*/ablation.json")):
        name = table.parent.name
        figures = json.loads(table.read_text(encoding="utf-8"))
        about = {"ablation": name, "machine": describe(), "versions": versions(), "commit": commit()}
        text = json.dumps({**about, **figures}, indent=1, ensure_ascii=False)
        (results / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        written.append(results / f"{name}.json")
    return written


if __name__ == "__main__":
    for path in keep():
        print(f"written: {path}")
