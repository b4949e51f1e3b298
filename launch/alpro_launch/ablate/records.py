"""What is on the disk about an ablation: how far each job is, when the test split was looked at, and a lock."""

import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from alpro_launch.ablate.jobs import Job
from alpro_stream.config import Config
from alpro_stream.errors import ConfigError, ProcessError
from alpro_stream.shards.storage import publish_bytes

TEST_FILE = "test.json"
_LOCK_WAIT_S = 60.0


class Record(Config):
    """How far a job is.

    Attributes:
        digest: of the job; one with another digest is run again.
        state: `started` was cut off; `diverged` is an outcome as `done` is, as the same job would diverge again.
        made: when it was done, in seconds since 1970; 0 before.
        made_from: the same of the job before it.
        seconds: of all its sittings.
        status: what the command ended with.
        command: the command line.
        last_lines: what it printed last, where it did not end well.
    """

    digest: str
    state: Literal["started", "done", "diverged", "failed"]
    made: float = 0.0
    made_from: float = 0.0
    seconds: float = 0.0
    status: int = 0
    command: str = ""
    last_lines: tuple[str, ...] = ()


class TestLook(Config):
    """When the test split was looked at, and with which grid."""

    looked_at: str
    grid: str


def read_record(job: Job) -> Record | None:
    """What is known of a job; None where it was never started, or what it wrote is gone."""
    values = _read(job.record)
    record = Record.model_validate(values) if values else None
    # One that failed may have come to nothing.
    return record if record and (record.state == "failed" or job.output.exists()) else None


def write_record(job: Job, record: Record) -> None:
    """Replaces what is known of a job."""
    write_aside(job.record, record.model_dump_json(indent=1) + "\n")


def read_test_look(out: Path) -> TestLook | None:
    """None where the test split was not looked at."""
    values = _read(out / TEST_FILE)
    return TestLook.model_validate(values) if values else None


def note_test_look(out: Path, grid: str) -> None:
    """Writes down that the test split is looked at now, unless it was before."""
    if read_test_look(out) is None:
        look = TestLook(looked_at=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"), grid=grid)
        write_aside(out / TEST_FILE, look.model_dump_json(indent=1) + "\n")


def check_test_look(out: Path, grid: str) -> None:
    """Nothing may be changed by what the test split has shown.

    Raises:
        ConfigError: it was looked at with another grid.
    """
    look = read_test_look(out)
    if look and look.grid != grid:
        raise ConfigError(
            f"the test split was looked at on {look.looked_at}; a changed grid needs a new `out` (now {out}). Undo the "
            "changes of stages, rows, seeds and choose to go on with this one"
        )


def write_aside(path: Path, text: str) -> None:
    """Writes a file whole: whoever reads it sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, text.encode("utf-8"))


def last_lines(path: Path, number: int = 8) -> tuple[str, ...]:
    """The end of a log, without empty lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())[-number:]


@contextmanager
def only_one_in(out: Path, say: Callable[[str], None], wait_s: float = _LOCK_WAIT_S) -> Iterator[int]:
    """Holds the folder; yields what children inherit, so that those of one that was killed hold it until they end.

    Raises:
        ProcessError: another one is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline, said = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ProcessError(
                        f"another `alpro ablate` is at work in {out}; wait for it, or set out"
                    ) from error
            if not said:
                say(f"another `alpro ablate` is at work in {out}, or what it started still saves; waiting for it")
                said = True
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it, and its stage is run again") from error
    return dict(values)


def commands_text(arguments: Sequence[str]) -> str:
    """A command line as it can be given by hand."""
    return shlex.join(["alpro", *arguments])
