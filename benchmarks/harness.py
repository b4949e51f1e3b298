"""What every benchmark shares: how variants are timed, and how results are judged, printed and written.

A benchmark is a script that measures and returns rows::

    from benchmarks.harness import Row, Target, main, measure

    def rows(arguments: argparse.Namespace) -> list[Row]:
        rates = measure({"ours": ours, "raw": raw}, repetitions=3 if arguments.quick else 15)
        goal = Target(at_least=0.8, of="ratio")
        return [Row.of("decode", rates["ours"], "clips/s", limit=rates["raw"], target=goal)]

    if __name__ == "__main__":
        main("decode", rows)
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.exit_status import INTERRUPTED
from alpro_stream.shards.storage import publish_bytes
from benchmarks import machine

Describe = Callable[[argparse.Namespace], Mapping[str, Any]]
"""From the arguments to what data was measured on, by name."""


Conclude = Callable[[argparse.Namespace, Sequence["Row"]], None]
"""From the arguments and the rows to what is shown below them."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All samples of one variant, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value to report."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float | None:
        """Interquartile range over the median; None for a single sample or a median of zero."""
        if len(self.samples) < 2 or self.median == 0:
            return None
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (third - first) / abs(self.median)


def measure(variants: Mapping[str, Callable[[], float]], repetitions: int, warmup: int = 1) -> dict[str, Measurement]:
    """Takes samples of all variants in turn, so that a slow moment of the machine meets all of them.

    Args:
        variants: by name, a function that does the work once and returns what was measured (a rate, a time).
        repetitions: samples of each variant that count.
        warmup: samples of each variant taken before, and dropped.

    Raises:
        ValueError: no variants, or fewer than one repetition.
    """
    if not variants or repetitions < 1 or warmup < 0:
        raise ValueError(
            f"got {len(variants)} variants, {repetitions} repetitions, {warmup} for warm-up; "
            "expected at least one variant and one repetition"
        )
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_number in range(-warmup, repetitions):
        # The first place moves on each round: no variant always starts on caches another one left.
        start = round_number % len(names)
        for name in names[start:] + names[:start]:
            sample = variants[name]()
            if round_number >= 0:
                samples[name].append(sample)
    return {name: Measurement(tuple(values)) for name, values in samples.items()}


def quotients(above: Measurement, below: Measurement) -> Measurement:
    """Of samples taken in turn, round by round: both of a round met the same moment of the machine."""
    return Measurement(tuple(a / b for a, b in zip(above.samples, below.samples, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the project promises: a bound on a row's value, or on its ratio to the limit.

    Exactly one bound is set; it says by itself whether more or less is better.
    """

    at_least: float | None = None
    at_most: float | None = None
    of: Literal["value", "ratio"] = "value"

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"a target has one bound; got at_least={self.at_least}, at_most={self.at_most}")

    def kept(self, number: float | None) -> bool:
        """Whether the number keeps the bound; a missing one or nan does not."""
        if number is None or math.isnan(number):
            return False
        return number >= self.at_least if self.at_least is not None else number <= (self.at_most or 0.0)

    def as_json(self) -> dict[str, Any]:
        """For example ``{"of": "ratio", "at_least": 0.8}``."""
        bound = {"at_least": self.at_least} if self.at_least is not None else {"at_most": self.at_most}
        return {"of": self.of, **bound}

    def __str__(self) -> str:
        sign, bound = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {bound:g}" + (" of the limit" if self.of == "ratio" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result, beside what the hardware or the raw library reaches in the same sitting."""

    name: str
    value: float
    unit: str
    spread: float | None = None
    """Interquartile range over the median."""
    limit: float | None = None
    limit_of: str = ""
    """What the limit is, in a few words, such as "matrix product"."""
    target: Target | None = None
    """None where nothing is promised."""
    details: Mapping[str, float] = field(default_factory=dict)
    """What was measured beside the value, by name and unit, such as ``"CPU ms/clip"``."""

    @classmethod
    def of(
        cls,
        name: str,
        measurement: Measurement,
        unit: str,
        limit: Measurement | float | None = None,
        target: Target | None = None,
        details: Mapping[str, float] | None = None,
        limit_of: str = "",
    ) -> "Row":
        """The row of a measurement."""
        return cls(
            name=name,
            value=measurement.median,
            unit=unit,
            spread=measurement.spread,
            limit=limit.median if isinstance(limit, Measurement) else limit,
            limit_of=limit_of,
            target=target,
            details=details or {},
        )

    @property
    def ratio(self) -> float | None:
        """Value over limit; None without a limit to divide by."""
        return self.value / self.limit if self.limit else None

    @property
    def ok(self) -> bool | None:
        """Whether the target was kept; None where there is none."""
        if self.target is None:
            return None
        return self.target.kept(self.ratio if self.target.of == "ratio" else self.value)

    def as_json(self) -> dict[str, Any]:
        """The row as plain values; numbers that are not finite become null, as JSON has none."""
        plain = _finite({"value": self.value, "spread": self.spread, "limit": self.limit, "ratio": self.ratio})
        return {
            "name": self.name,
            "value": plain["value"],
            "unit": self.unit,
            "spread": plain["spread"],
            "limit": plain["limit"],
            "ratio": plain["ratio"],
            "target": self.target.as_json() if self.target else None,
            "ok": self.ok,
            **({"limit_of": self.limit_of} if self.limit_of else {}),
            **({"details": _finite(self.details)} if self.details else {}),
        }


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: value if value is not None and math.isfinite(value) else None for key, value in numbers.items()}


def results(
    name: str, rows: Sequence[Row], content: Mapping[str, Any] | None = None, is_quick: bool = False
) -> dict[str, Any]:
    """The whole result of a benchmark as plain values, with where and on what it was measured."""
    return {
        "benchmark": name,
        **({"quick": True} if is_quick else {}),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        **({"content": dict(content)} if content else {}),
        "rows": [row.as_json() for row in rows],
    }


def table(name: str, rows: Sequence[Row]) -> Table:
    """The rows for a terminal: the ratio first, since it is what travels from machine to machine."""
    shown = Table(title=name, title_justify="left", title_style="bold")
    shown.add_column("")
    for heading in ("of the limit", "value", "limit"):
        shown.add_column(heading, justify="right")
    shown.add_column("unit")
    named = any(row.limit_of for row in rows)
    if named:
        shown.add_column("the limit is")
    shown.add_column("spread", justify="right")
    shown.add_column("target")
    shown.add_column("kept")
    details = list(dict.fromkeys(name for row in rows for name in row.details))
    for name in details:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.name,
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            number(row.value),
            number(row.limit),
            row.unit,
            *([row.limit_of or "-"] if named else []),
            "-" if row.spread is None else f"{100 * row.spread:.0f} %",
            "-" if row.target is None else str(row.target),
            {None: "-", True: "yes", False: "NO"}[row.ok],
            *(number(row.details.get(name)) for name in details),
        )
    return shown


def check_writable(path: Path, flag: str = "--json") -> None:
    """Before anything is measured, as it takes long.

    Args:
        path: of a file with results; its folder is made.
        flag: that says where, for the message.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: the results cannot be written there ({error.strerror})") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a folder" if path.is_dir() else f"{path.parent} is not writable"
        raise ConfigError(f"{flag} {path}: the results cannot be written there ({why})")


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def run(
    name: str,
    build_rows: Callable[[argparse.Namespace], Sequence[Row]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
    describe_content: Describe | None = None,
    conclude: Conclude | None = None,
) -> int:
    """Parses the arguments, measures, prints the table and writes the file; returns the exit status.

    Args:
        name: of the benchmark, as in ``benchmarks/NAME.py``.
        build_rows: measures; gets the arguments (``quick`` asks for few repetitions).
        add_arguments: declares arguments of this benchmark's own.
        argv: the command line without the program, by default the process's.
        describe_content: says, after measuring, what data it was measured on; for the table and the file.
        conclude: prints or writes what follows from the rows, below the table.

    Returns:
        0; with ``--check`` 1 if a target was missed; 2 if the benchmark could not be run; 130 at Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    if add_arguments is not None:
        add_arguments(parser)
    arguments = parser.parse_args(argv)
    # Asked to end, it leaves no processes and no folders behind.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if arguments.json is not None:
            check_writable(arguments.json)
        rows = build_rows(arguments)
        content = describe_content(arguments) if describe_content is not None else None
    except (AlproError, OSError) as error:  # A folder that is a file, a full disk: the system's text says it.
        Console(stderr=True).print(f"error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: nothing was written", markup=False)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    # Piped output has no width of its own, and 80 columns would break the names.
    width = None if sys.stdout.isatty() else 220
    console = Console(width=width)
    console.print(table(name, rows))
    if content:
        console.print("measured on:", ", ".join(f"{key} {value}" for key, value in content.items()), soft_wrap=True)
    if arguments.json is not None:
        save(arguments.json, results(name, rows, content, arguments.quick))
    if conclude is not None:
        conclude(arguments, rows)
    return 1 if arguments.check and any(row.ok is False for row in rows) else 0


def main(
    name: str,
    build_rows: Callable[[argparse.Namespace], Sequence[Row]],
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    describe_content: Describe | None = None,
    conclude: Conclude | None = None,
) -> None:
    """Entry point of a benchmark script: `run`, then the end of the process with its status."""
    sys.exit(run(name, build_rows, add_arguments, describe_content=describe_content, conclude=conclude))


def number(value: float | None) -> str:
    """A value with about four digits."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
