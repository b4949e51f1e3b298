"""Everything that needs a GPU, in one go and unattended: its tests, then what it reaches: `bash benchmarks/gpu.sh`.

Each piece is a process with a share of the time. One that hangs or crashes is a line "failed: why", what is not
installed is a line "left out: needs ...", and the rest goes on. Writes OUT/gpu.json and OUT/gpu.md, also when it is
interrupted. The exit status is 1 when anything failed, and 2 when nothing could be begun.

``--device cpu --quick`` runs the same lines at toy size without a GPU: to see that they run.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpro_stream.errors import ConfigError
from benchmarks.gpu_pieces import environment, report
from benchmarks.gpu_pieces.budget import PIECES, Piece, allowance
from benchmarks.gpu_pieces.journal import Journal, Outcome
from benchmarks.gpu_pieces.running import INTERRUPTED, broken_off, work_through
from benchmarks.harness import check_writable

_PROBE_S = 120.0
# For what is written at the end, and for processes that have to be killed.
_RESERVE_S = 8.0
_NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")
# A test alone may take so long; more than that, and its piece's `stall_s` ends the process.
_TEST_S = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pieces one after the other; returns the exit status."""
    arguments = _parser().parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes - _RESERVE_S
    if arguments.device == "cpu" and not arguments.quick:
        return _refuse("--device cpu has nothing to measure: add --quick, which only shows that everything runs")
    variables = child_environment(arguments.device)
    try:
        found = environment.ask(_PROBE_S, variables)
    except RuntimeError as error:
        return _refuse(str(error))
    if arguments.device == "cuda" and found["gpu"] is None:
        return _refuse("PyTorch sees no GPU; --device cpu --quick shows that everything else runs")
    _say_what_is_here(found)
    try:
        check_writable(arguments.out / "gpu.json", "--out")
    except ConfigError as error:
        return _refuse(str(error))
    pieces = [piece for piece in PIECES if arguments.only is None or piece.name in arguments.only]
    done: list[report.Done] = []
    if arguments.only is None:
        done.append(_left_out("collectives", "one GPU has nothing to exchange; on several, `alpro preflight` measures"))
    # Also when it is asked to end: its processes are ended, and what is known is written.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        run_pieces(pieces, deadline, arguments, variables, found["missing"], done)
    finally:
        begun = {one.piece for one in done}
        done += [_left_out(piece.name, INTERRUPTED) for piece in pieces if piece.name not in begun]
        signal.signal(signal.SIGTERM, before)
        write(arguments.out, report.result(found, done, arguments.device, arguments.quick))
    return 1 if report.has_failed(done) else 0


def run_pieces(
    pieces: Sequence[Piece],
    deadline: float,
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    missing: Mapping[str, str],
    done: list[report.Done],
) -> None:
    """Runs the pieces one after the other; those that find no time are left out.

    Args:
        pieces: in their order.
        deadline: for all of them, by `time.monotonic`.
        arguments: of the command line.
        variables: the environment of the processes.
        missing: modules that are not installed.
        done: what became of each is added here, also of one in which this process is asked to end.
    """
    with tempfile.TemporaryDirectory(prefix="alpro-gpu-", ignore_cleanup_errors=True) as folder:
        for place, piece in enumerate(pieces):
            seconds = allowance(max(0.0, deadline - time.monotonic()), pieces[place:])
            needed = [name for name in _NEEDED_BY_TESTS if name in missing] if piece.name == "tests" else []
            if needed:
                done.append(_left_out(piece.name, f"needs {needed[0]}, which is not installed"))
            elif seconds is None:
                done.append(_left_out(piece.name, "no time"))
            else:
                _run_piece(piece, seconds, arguments, variables, Path(folder), done)


def _run_piece(
    piece: Piece,
    seconds: float,
    arguments: argparse.Namespace,
    variables: Mapping[str, str],
    folder: Path,
    done: list[report.Done],
) -> None:
    print(f"{piece.name}: at most {seconds:.0f} s", flush=True)
    started = time.monotonic()
    journal, log = Journal(folder / piece.name), arguments.out / f"{piece.name}.log"
    log.unlink(missing_ok=True)
    command = command_of(piece, arguments, journal.path)
    # Without a GPU nothing hangs on a driver, and a part may take as long as a busy machine makes it.
    stall_s = piece.stall_s if arguments.device == "cuda" else seconds
    # What a killed process leaves behind is removed with the folder.
    try:
        outcomes = work_through(command, journal, log, seconds, stall_s, {**variables, "TMPDIR": str(folder)})
    except BaseException:  # Asked to end: by Ctrl-C, or by SIGTERM.
        outcomes = broken_off(journal)
        raise
    finally:
        spent = time.monotonic() - started
        done.append(report.Done(piece=piece.name, outcomes=outcomes, seconds=spent, allowed_s=seconds))
    for outcome in outcomes:
        if piece.name != "tests" or outcome.state == "failed":
            print(f"  {outcome.state}: {outcome.name}{': ' * bool(outcome.why)}{outcome.why}", flush=True)


def command_of(piece: Piece, arguments: argparse.Namespace, journal: Path) -> list[str]:
    """The command line of a piece's process."""
    python = [sys.executable, "-m"]
    if piece.name == "tests":
        plugin = ["-p", "benchmarks.gpu_pieces.pytest_journal", "--journal", str(journal)]
        options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--timeout={_TEST_S}"]
        return [*python, "pytest", "tests/gpu", *options, *plugin]
    options = ["--device", arguments.device, *(["--quick"] if arguments.quick else []), "--journal", str(journal)]
    return [*python, "benchmarks.gpu_pieces.piece", piece.name, *options]


def child_environment(device: str) -> dict[str, str]:
    """Variables of every process: nothing is fetched, nobody waits with a spinning thread."""
    chosen = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # A GPU that is not asked for is not seen: what looks for one by itself goes to the CPU too.
    return {**os.environ, **chosen, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def write(out: Path, values: Mapping[str, Any]) -> None:
    """The two files, and the table on the screen."""
    text = report.table(values)
    (out / "gpu.json").write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten: {out / 'gpu.json'}, {out / 'gpu.md'}", flush=True)


def _say_what_is_here(found: Mapping[str, Any]) -> None:
    gpu = found["gpu"]
    print(f"GPU: {gpu['name']}, driver {gpu['driver'].get('driver_version', 'unknown')}" if gpu else "GPU: none")
    for line in environment.differences(found):
        print(f"other than expected: {line}")
    for name, what in found["missing"].items():
        print(f"not installed: {name} ({what}); what needs it is left out")
    if shutil.which("nvidia-smi") is None and gpu:
        print("not installed: nvidia-smi; the driver's version is not known")


def _left_out(name: str, why: str) -> report.Done:
    outcomes = [Outcome(name=name, state="left out", why=why)]
    return report.Done(piece=name, outcomes=outcomes, seconds=0.0, allowed_s=0.0)


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} is none between 0 and a day")
    return minutes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, few repetitions: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for everything (%(default)g)")
    names = [piece.name for piece in PIECES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"run these pieces; of {names}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
