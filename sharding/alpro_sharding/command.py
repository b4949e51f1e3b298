"""The command: shared by `alpro shard` and ``python -m sharding``."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alpro_sharding.config import ShardConfig
from alpro_sharding.job import shard
from alpro_sharding.report import render_summary
from alpro_stream.config import load_config
from alpro_stream.errors import AlproError

_USAGE = "usage: python -m sharding CONFIG [key=value ...]"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Shards as the arguments say: a configuration file, then overrides. Returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        Console(stderr=not argv).print(_USAGE, markup=False)
        return 0 if argv else EXIT_USAGE
    return run_shard(argv[0], list(argv[1:]))


def run_shard(config_path: str, overrides: Sequence[str]) -> int:
    """Shards with a progress bar and prints a summary, or one line that says what is wrong.

    Returns:
        0; 1 when the work could not be done; 130 when interrupted (the same command then goes on).
    """
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        config = load_config(ShardConfig, config_path, overrides)
        with _progress(errors) as progress:
            bar = progress.add_task("sharding", total=None)
            summary = shard(config, lambda done, total: progress.update(bar, completed=done, total=max(done, total)))
    except AlproError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on with what is missing")
        return EXIT_INTERRUPTED
    console.print(render_summary(summary))
    return 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    # Without a terminal a bar is noise in a log file.
    hidden = not sys.stderr.isatty()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=hidden)
