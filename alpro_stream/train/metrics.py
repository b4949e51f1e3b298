"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases if asked for, and one line of progress."""

import importlib
import json
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from alpro_stream.config import Config
from alpro_stream.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
RESOLVED_CONFIG_FILE = "config.yaml"
WANDB_ID_FILE = "wandb-id.txt"


class WandbConfig(Config):
    """Weights & Biases beside the other metrics; it is not installed with this package."""

    project: str = Field(min_length=1)
    """Project in which the run is shown."""
    name: str | None = None
    """Name of the run there; by default Weights & Biases makes one up."""
    entity: str | None = None
    """User or team; by default that of the login."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes to RUN/wandb, for `wandb sync` later; `disabled` does nothing."""


class MetricsWriter:
    """Writes the metrics of the steps of one run; used on the first rank only.

    Args:
        run_dir: gets ``metrics.jsonl``, ``tensorboard/`` and, with Weights & Biases, the id of its run there.
        first_step: where this run goes on; later lines, of steps that were not committed, are dropped.
        wandb: sends the metrics there too; None does not.

    Raises:
        ConfigError: Weights & Biases is asked for, and is not installed or cannot be started.
    """

    def __init__(self, run_dir: Path, first_step: int, wandb: WandbConfig | None = None) -> None:
        # First, because it is what can fail: the files stay as they were.
        self._wandb = _start_wandb(wandb, run_dir, first_step) if wandb else None
        self._path = run_dir / METRICS_FILE
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
        if self._wandb:
            # The step is a value like the others: of what is given as its own step, Weights & Biases drops whatever is
            # behind the last one, which after a return to an earlier checkpoint is all that counts.
            self._wandb.log({"step": step, **{k: value for k, value in values.items() if isinstance(value, float)}})

    def close(self) -> None:
        """Flushes and closes all; while an exception ends the run, Weights & Biases is told that it failed."""
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _start_wandb(config: WandbConfig, run_dir: Path, first_step: int) -> Any:
    """The run of Weights & Biases: the one that it was before, if something of that is left to go on from."""
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"train.wandb is set, but Weights & Biases cannot be imported ({error}): install it with "
            "`pip install wandb` in this environment, or remove train.wandb"
        ) from error
    path = run_dir / WANDB_ID_FILE
    if first_step == 0 or not path.is_file():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    resolved = run_dir / RESOLVED_CONFIG_FILE
    try:
        run = wandb.init(
            project=config.project,
            name=config.name,
            entity=config.entity,
            mode=config.mode,
            id=path.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.is_file() else None,
            # What a run that goes on may change, such as its length.
            allow_val_change=True,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases cannot be started: {error}. Log in with `wandb login`, or set train.wandb.mode=offline "
            "and send the run with `wandb sync` later"
        ) from error
    run.define_metric("*", step_metric="step")
    return run


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; an unfinished last line (a killed run) is left out."""
    path = run_dir / METRICS_FILE
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
            TextColumn(title, style="bold", markup=False),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=first_step, text="")
        self._bar.start()

    def show(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Shows a committed step; figures that are not there are left out."""
        text = progress_text(values, timing)
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_print > 10 or step == self._num_steps):
            self._last_print = now
            self.say(f"{self._title} {step}/{self._num_steps} {text}")

    def say(self, text: str) -> None:
        """A line of its own, above the one that changes."""
        # Not as markup: paths and settings such as skip_steps=[[1,3]] have brackets of their own.
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        self._bar.stop()


def progress_text(values: Mapping[str, float], timing: Mapping[str, float]) -> str:
    """Loss terms, clips/s and waits in a line, as far as they are there."""
    terms = [f"{name.removeprefix('loss/')} {x:.3f}" for name, x in values.items() if name.startswith("loss/")]
    speed = [f"{timing['clips_per_s']:.1f} clips/s"] if "clips_per_s" in timing else []
    waits = [
        f"{what} {timing[f'{what}_wait_percent']:.1f} %"
        for what in ("data", "prompter")
        if f"{what}_wait_percent" in timing
    ]
    parts = [" ".join(terms), *speed, f"wait: {' '.join(waits)}" if waits else ""]
    return " | ".join(part for part in parts if part)
