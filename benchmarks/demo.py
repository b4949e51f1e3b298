"""What the demo costs: seconds of each stage and of the whole, memory of all its processes, and what it reaches.

One run, from nothing, in a folder of its own: a demo is a promise to a newcomer, not a figure to optimise. The limit of
the recalls is chance. `--quick` runs the demo as well; there is nothing to leave out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from alpro_stream.errors import AlproError
from benchmarks.harness import Row, Target, main

_POLL_S = 0.5


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Runs the demo once and reads off what it left."""
    with tempfile.TemporaryDirectory(prefix="alpro-demo-") as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "alpro_launch.cli", "demo", "--work-dir", folder]
        with subprocess.Popen(command) as process:
            memory = PeakMemory(process.pid)
            status = process.wait()
        whole_s = time.perf_counter() - started
        if status:
            raise AlproError(f"the demo ended with status {status}")
        return _rows(Path(folder), whole_s, memory.peak_gib)


def _rows(folder: Path, whole_s: float, peak_gib: float) -> list[Row]:
    """What the demo left in its folder, and what it cost."""
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "evaluation/result.json").read_text(encoding="utf-8"))
    stages = [Row(name=name, value=value, unit="s") for name, value in seconds.items()]
    recalls = [
        Row(
            name=f"{score.upper()} {direction.replace('_', ' ')} R@1",
            value=values["recall_at_1"],
            unit="%",
            limit=result["chance"]["recall_at_1"],
            limit_of="chance",
        )
        for score, directions in result["metrics"].items()
        for direction, values in directions.items()
    ]
    return [
        Row(name="whole demo", value=whole_s, unit="s", target=Target(at_most=360)),
        *stages,
        Row(name="memory of all processes", value=peak_gib, unit="GiB", target=Target(at_most=6)),
        *recalls,
    ]


class PeakMemory:
    """Largest sum, seen every half second, of the memory of a process and all its descendants.

    Proportional set sizes: memory that processes share counts once.
    """

    def __init__(self, pid: int) -> None:
        self.peak_gib = 0.0
        self._root = psutil.Process(pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak_gib = max(self.peak_gib, sum(map(_memory_bytes, family)) / 2**30)
            time.sleep(_POLL_S)


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # It ended while it was looked at.


if __name__ == "__main__":
    main("demo", rows)
