"""`alpro bench`: the benchmarks of a checkout, one by name, or all one after the other with one table in the end."""

import argparse
import ast
import re
import signal
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from alpro_launch.processes import run
from alpro_stream.errors import ConfigError
from alpro_stream.exit_status import INTERRUPTED
from alpro_stream.shards.storage import publish_bytes

FOLDER = Path("benchmarks")
ALL = "all"
_GPU = "gpu"
"""Not among those that `all` runs: it is for another machine, and has a harness of its own."""
_WIDTH = 100


def run_bench(name: str | None, rest: Sequence[str]) -> int:
    """Runs a benchmark, all of them, or says which there are; returns the exit status.

    Args:
        name: of a script, ``all``, or None for the list.
        rest: arguments of the script; of all of them ``--quick``, ``--check`` and ``--json FOLDER``.

    Raises:
        ConfigError: no such benchmark here, or none at all.
    """
    known = known_benchmarks(FOLDER)
    if name is None:
        print(listing(known))
        return 0
    if name == ALL and known:
        return _run_all(list(known), rest)
    script = FOLDER / f"{name}.py"
    if (name not in known and name != _GPU) or not script.is_file():
        raise ConfigError(
            f"no benchmark {name} here; run this in the folder of a checkout"
            + (f", with one of: {', '.join(known)}, or {ALL}" if known else " (the wheel has no benchmarks)")
        )
    return _run(script, rest)


def _run(script: Path, arguments: Sequence[str]) -> int:
    """Its exit status; at Ctrl-C it says so itself."""
    try:
        status = run([sys.executable, str(script), *arguments])
    except KeyboardInterrupt:
        return INTERRUPTED
    return 128 - status if status < 0 else status


def known_benchmarks(folder: Path) -> dict[str, str]:
    """The scripts in a folder that use the harness, with what each says it measures in one sentence."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))}
    return {
        name: first_sentence(text)
        for name, text in texts.items()
        if "\nfrom benchmarks.harness import" in text and "__main__" in text
    }


def first_sentence(source: str) -> str:
    """Of the docstring of a module, without how it is called."""
    paragraph = " ".join((ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].split())
    return re.sub(r":? ?`python benchmarks/\S+?`", "", paragraph).partition(". ")[0].strip(" .")


def listing(known: dict[str, str]) -> str:
    """A line for each benchmark.

    Raises:
        ConfigError: there are none.
    """
    if not known:
        raise ConfigError(f"no {FOLDER} here; run this in the folder of a checkout (the wheel has no benchmarks)")
    longest = max(map(len, known))
    lines = [f"{name:<{longest}}  {textwrap.shorten(text, _WIDTH, placeholder=' ...')}" for name, text in known.items()]
    return "\n".join([*lines, f"{ALL:<{longest}}  all of these one after the other, with one table in the end"])


def _run_all(names: Sequence[str], rest: Sequence[str]) -> int:
    """A benchmark that cannot be run does not keep the others from it; the status is that of the first such one."""
    parser = argparse.ArgumentParser(prog=f"alpro bench {ALL}", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that they run")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write the results there, a file for each")
    wanted = parser.parse_args(rest)
    flags = [flag for flag in ("--quick", "--check") if flag in rest]
    if wanted.json:
        wanted.json.mkdir(parents=True, exist_ok=True)
    statuses, done = {}, []
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        for number, name in enumerate(names, start=1):
            print(f"\n{name} ({number} of {len(names)})", flush=True)
            file = Path(folder) / f"{name}.json"
            statuses[name] = _run(FOLDER / f"{name}.py", [*flags, "--json", str(file)])
            if statuses[name] in (INTERRUPTED, 128 + signal.SIGTERM):
                break
            if file.is_file():
                done.append(str(file))
                # Not before: where nothing was measured now, the file of an earlier time stays, outside of the table.
                if wanted.json:
                    publish_bytes(wanted.json / file.name, file.read_bytes())
        _run(FOLDER / "summary.py", done)
    for name, status in statuses.items():
        if status:
            print(f"{name} ended with status {status}", file=sys.stderr)
    return next((status for status in statuses.values() if status), 0)
