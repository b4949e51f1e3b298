"""A line of the table of `alpro preflight`, and the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from alpro_stream.errors import Fault

Verdict = Literal["ok", "warn", "FAIL"]

_WARN_FROM = 0.9
_STYLES: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True, slots=True)
class Line:
    """What one check found.

    Attributes:
        check: its name.
        found: what was measured, or what is wrong.
        against: what it was compared with; empty where there is nothing to compare with.
        verdict: FAIL where the run would not start, or would not live long.
        remedy: what to do.
        fault: of what fails, for the exit status.
    """

    check: str
    found: str
    against: str = ""
    verdict: Verdict = "ok"
    remedy: str = ""
    fault: Fault = "configuration"


def verdict_of_share(share: float) -> Verdict:
    """Of what is needed over what there is: there must be enough, and a tenth of it should be left."""
    if share > 1:
        return "FAIL"
    return "warn" if share > _WARN_FROM else "ok"


def first_fault(lines: Sequence[Line]) -> Fault | None:
    """Of the first line that fails; None where none does."""
    return next((line.fault for line in lines if line.verdict == "FAIL"), None)


def table_of(lines: Sequence[Line]) -> Table:
    """The lines as they are shown."""
    table = Table("check", "found", "against what", "verdict", "what to do", show_lines=True)
    for line in lines:
        # As text: brackets of paths and settings are no markup.
        cells = [Text(cell) for cell in (line.check, line.found, line.against)]
        table.add_row(*cells, Text(line.verdict, style=_STYLES[line.verdict]), Text(line.remedy))
    return table


def gib(num_bytes: float) -> str:
    """``3.2 GiB``; below a tenth of one in MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 0.1 * 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def counted(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
