"""What a process has done so far, line by line in a file: it says the same when the process hangs, crashes or is ended.

A process announces the names of all its parts, then notes when each begins and how it ended. Started again with the
same file, it goes on with the parts that are not in it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed", "left out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one part.

    Attributes:
        name: of the part.
        state: whether it was done.
        why: it was not done, in one line.
        rows: what it measured, as `benchmarks.harness.Row.as_json` gives them.
        seconds: that it took.
    """

    name: str
    state: State
    why: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


@dataclass(slots=True)
class Record:
    """What a journal says.

    Attributes:
        names: of all parts, in order.
        outcomes: of those that ended.
        running: the part that began and did not end.
    """

    names: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    running: str | None = None

    @property
    def left(self) -> list[str]:
        """Parts that did not begin."""
        seen = {one.name for one in self.outcomes} | {self.running}
        return [name for name in self.names if name not in seen]


class Journal:
    """Reads and writes the file.

    Args:
        path: of the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began = time.monotonic()

    def announce(self, names: Sequence[str]) -> None:
        """Says which parts there are; those of an earlier process with this file stay."""
        self._write({"names": list(names)})

    def begin(self, name: str) -> None:
        """Says that a part begins."""
        self._began = time.monotonic()
        self._write({"begun": name})

    def end(self, name: str, state: State, why: str = "", rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Says how a part ended; of what went wrong the first line."""
        seconds = round(time.monotonic() - self._began, 3)
        lines = why.strip().splitlines() or [""]
        self._write({"ended": name, "state": state, "why": lines[0], "rows": list(rows), "seconds": seconds})

    def read(self) -> Record:
        """What was written so far, without a line that was cut off."""
        record = Record()
        if not self.path.is_file():
            return record
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if "names" in line:
                record.names += [name for name in line["names"] if name not in record.names]
            elif "begun" in line:
                record.running = line["begun"]
            else:
                values = {key: line[key] for key in ("state", "why", "rows", "seconds")}
                record.outcomes.append(Outcome(name=line["ended"], **values))
                record.running = None
        return record

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            # Behind a line that was cut off, a new one: that one alone is lost.
            file.write(("\n" if _is_cut(self.path) else "") + json.dumps(line) + "\n")


def _is_cut(path: Path) -> bool:
    data = path.read_bytes()[-1:]
    return data not in (b"", b"\n")
