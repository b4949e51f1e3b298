"""The command: shared by `alpro shard` and ``python -m sharding``."""

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from alpro_sharding.config import ShardConfig
from alpro_sharding.estimate import estimate
from alpro_sharding.flags import add_shard_flags
from alpro_sharding.job import Progress, shard
from alpro_sharding.report import render_estimate, render_summary, spell_progress
from alpro_stream.config import load_config
from alpro_stream.errors import AlproError
from alpro_stream.exit_status import INTERRUPTED, status_of

_LOG_EVERY_S = 30.0


def main(argv: Sequence[str]) -> int:
    """Shards as the arguments say: a configuration file, then overrides. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sharding", description=_DESCRIPTION, allow_abbrev=False)
    add_shard_flags(parser)
    parser.add_argument("config", help="configuration file, such as configs/shard/default.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the file")
    arguments = parser.parse_intermixed_args(list(argv))
    return run_shard(arguments.config, arguments.overrides, arguments)


_DESCRIPTION = "Turns a corpus of videos and images into shards, on a local Ray or on the cluster of a Ray job."


def run_shard(config_path: str, overrides: Sequence[str], flags: argparse.Namespace) -> int:
    """Shards with a progress bar and prints a summary, or one line that says what is wrong.

    Args:
        config_path: the configuration file.
        overrides: ``key=value``.
        flags: what `add_shard_flags` adds.

    Returns:
        The exit status, see `alpro_stream.exit_status`; interrupted or not, the same command goes on.
    """
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        config = load_config(ShardConfig, config_path, overrides)
        with _ProgressBar(errors) as bar:
            if flags.estimate:
                found = estimate(config, flags.rows, lambda done, total: bar.show(Progress(total, done, done)))
                result = render_estimate(found)
            else:
                result = render_summary(shard(config, bar.show, retry_failed=flags.retry_failed))
    except AlproError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        return status_of(error)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on with what is missing")
        return INTERRUPTED
    console.print(result)
    return 0


class _ProgressBar:
    """A bar on a terminal; elsewhere, where a bar is noise, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_terminal = sys.stderr.isatty()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, disable=not self._is_terminal)
        self._task = self._bar.add_task("reading the manifest", total=None)
        self._started: float | None = None
        self._logged = time.monotonic()

    def show(self, progress: Progress) -> None:
        """Shows how far a run is."""
        now = time.monotonic()
        self._started = self._started or now
        text = spell_progress(progress, now - self._started)
        self._bar.update(self._task, completed=progress.num_done, total=progress.num_rows, description=text)
        if not self._is_terminal and now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            self._console.print(f"{progress.num_done:,} of {progress.num_rows:,} {text}", markup=False)

    def __enter__(self) -> "_ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
