"""The entry of every rank of `alpro preflight`: looks at what a run needs before it starts, in under two minutes.

`python -m alpro_launch.preflight CONFIG [key=value ...]`, or `deepspeed --module alpro_launch.preflight CONFIG ...`.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from alpro_launch.preflight_checks.lines import Verdict, counted, first_fault, table_of
from alpro_launch.processes import end_with_parent
from alpro_launch.rank_entry import is_first_rank, run_rank
from alpro_launch.topology import take_place
from alpro_stream.config import load_config
from alpro_stream.exit_status import PREEMPTED, STATUS

if TYPE_CHECKING:
    from alpro_launch.preflight_run import Preflight

# From the first attempt to reach the others on. What is over then is told, and a rank that is missing asked for, which
# takes up to 20 s more.
_TOTAL_S = 90.0
# Of one rank for the others: no check takes longer.
_TIMEOUT_S = 65.0
_LEAST_WIDTH = 140


def main(argv: Sequence[str]) -> int:
    """Checks what the configuration needs; returns the exit status, see docs/cluster.md."""
    arguments = _parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # So that what was written is removed.
    signal.signal(signal.SIGTERM, _end)
    return run_rank(lambda: _check(arguments.config, arguments.overrides, arguments.json))


def _end(number: int, _: object) -> None:
    if "LOCAL_WORLD_SIZE" not in os.environ and is_first_rank():  # `alpro preflight` says it for its ranks.
        print("asked to stop before all checks were made", file=sys.stderr, flush=True)
    sys.exit(PREEMPTED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alpro_launch.preflight")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path)
    # The launcher passes it; it is in the environment too, where `join_world` reads it.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def _check(path: str, overrides: Sequence[str], report: Path | None) -> int:
    if report:  # That of another time would be taken for this one's.
        report.unlink(missing_ok=True)
    if "CROSS_RANK" in os.environ:  # The launcher of deepspeed leaves its ranks behind when it is killed.
        end_with_parent()
    # Imported here and not above: the prompter process imports this module again, and needs none of it.
    import torch

    from alpro_launch.preflight_checks.written import Written
    from alpro_launch.preflight_run import Preflight
    from alpro_stream.run import RunConfig
    from alpro_stream.train.distributed import join_world

    config = load_config(RunConfig, path, overrides)
    since = time.monotonic()
    take_place(_TIMEOUT_S, "nccl" if torch.cuda.is_available() else "gloo")
    # Versions that differ are a line of the table.
    world = join_world(_TIMEOUT_S, run=f"the preflight of {config.run_dir.absolute()}", since=since)
    written = Written()
    try:
        with ExitStack() as stack:
            preflight = Preflight(config, world, _TOTAL_S, stack, written, since)
            if world.is_first:  # Also what was found before a rank was lost.
                stack.callback(lambda: _show(preflight, time.monotonic() - since, report))
            preflight.run()
        # The launcher ends all ranks with the first one that fails: not before the table is there.
        preflight.wait_for_all()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Of the launcher, after another rank has ended.
        # Last: the ranks of a machine share a folder, and none of them writes there any more.
        written.remove()
    fault = first_fault(preflight.lines)
    return STATUS[fault] if fault else 0


def _show(preflight: "Preflight", seconds: float, report: Path | None) -> None:
    lines, hosts = preflight.lines, preflight.hosts
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _LEAST_WIDTH)
    console.print(table_of(lines))
    verdicts = [line.verdict for line in lines]
    num_ok, num_warnings, num_failures = (verdicts.count(verdict) for verdict in get_args(Verdict))
    print(
        f"{counted(len(hosts), 'rank')} on {counted(len({*hosts}), 'host')}, {seconds:.0f} s: "
        f"{num_ok} ok, {counted(num_warnings, 'warning')}, {counted(num_failures, 'failure')}"
        f"{'' if preflight.is_done else '; ended before all checks were made'}",
        flush=True,
    )
    if report:
        values = {"hosts": list(hosts), "seconds": round(seconds, 1), "lines": [asdict(line) for line in lines]}
        report.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except SystemExit as asked:
        status = int(asked.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # A check that hangs is in a thread that cannot be ended.
    os._exit(status)
