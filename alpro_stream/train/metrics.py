"""Metrics of a run: JSON lines, TensorBoard, and one line of progress."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes the metrics of the steps of one run; used on the first rank only.

    Args:
        run_dir: gets ``metrics.jsonl`` and ``tensorboard/``.
        first_step: where this run goes on; later lines, of steps that were not committed, are dropped.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= first_step]
        # Aside, then renamed: a run that is killed here must not lose the lines of the runs before it.
        aside = self._path.with_name(f".{self._path.name}.partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.rename(self._path)
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """One line for a committed step."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; an unfinished last line (a killed run) is left out."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class ProgressLine:
    """One line on the terminal: step, loss terms, clips/s, waits. Without a terminal, a line now and then."""

    def __init__(self, title: str, num_steps: int, first_step: int, shown: bool) -> None:
        self._console = Console(file=sys.stderr, quiet=not shown, soft_wrap=True)
        self._title, self._num_steps = title, num_steps
        self._last_print = 0.0
        self._bar = Progress(
            TextColumn(f"[bold]{title}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=first_step, text="")
        self._bar.start()

    def show(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Shows a committed step."""
        terms = " ".join(f"{name.removeprefix('loss/')} {x:.3f}" for name, x in values.items() if "loss/" in name)
        text = (
            f"{terms} | {timing['clips_per_s']:.1f} clips/s | wait: data {timing['data_wait_percent']:.1f} % "
            f"prompter {timing['prompter_wait_percent']:.1f} %"
        )
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_print > 10 or step == self._num_steps):
            self._last_print = now
            self._console.print(f"{self._title} {step}/{self._num_steps} {text}", highlight=False)

    def say(self, text: str) -> None:
        """A line of its own, above the one that changes."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        self._bar.stop()
