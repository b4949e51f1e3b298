"""`alpro ablate`: runs the grid, and writes what it shows."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from alpro_launch.ablate.config import AblateConfig
from alpro_launch.ablate.jobs import Job, grid_digest, make_jobs
from alpro_launch.ablate.markdown import table_text
from alpro_launch.ablate.page import page_html
from alpro_launch.ablate.records import (
    Record,
    check_test_look,
    commands_text,
    note_test_look,
    only_one_in,
    read_record,
    read_test_look,
    write_aside,
)
from alpro_launch.ablate.runner import Runner
from alpro_launch.ablate.schedule import fate, states
from alpro_launch.ablate.table import Table, make_table
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.result import read_result
from alpro_stream.exit_status import HARDWARE

TABLE_FILE, TEXT_FILE, PAGE_FILE = "ablation.json", "ablation.md", "page.html"


def run_ablate(path: str, overrides: Sequence[str], arguments: argparse.Namespace, find: Callable[[str], str]) -> int:
    """Runs what is not done, or only what the flags say; returns the exit status.

    Args:
        path: of the configuration.
        overrides: of it.
        arguments: flags `test`, `table` and `dry_run`.
        find: from the name of a configuration file to its path.

    Raises:
        AlproError: nothing was begun; see `make_jobs`.
    """
    config = load_config(AblateConfig, path, overrides)
    ablation = _Ablation(config, make_jobs(config, find))
    if arguments.dry_run:
        ablation.list_jobs(arguments.test)
        return 0
    if arguments.table:
        print(ablation.write_table())
        return 0
    with only_one_in(config.out, _say) as lock:
        return ablation.run(arguments.test, lock)


class _Ablation:
    """The jobs of a grid, and how far they are."""

    def __init__(self, config: AblateConfig, jobs: Sequence[Job]) -> None:
        self._config, self._jobs = config, jobs
        self._grid = grid_digest(jobs, config.choose)
        check_test_look(config.out, self._grid)
        self._look_up()

    def _look_up(self) -> None:
        self._records: Mapping[Job, Record | None] = {job: read_record(job) for job in self._jobs}
        self._found = states(self._jobs, self._records)

    def list_jobs(self, with_test: bool) -> None:
        """Prints what would be run."""
        for job in self._jobs:
            if self._found[job] == "todo" and (with_test or not job.held_back):
                record = self._records[job]
                again = " (again, its settings changed)" if record and record.digest != job.digest else ""
                print(f"{job.title}{again}\n    {commands_text(job.arguments)}")
        counts = {state: list(self._found.values()).count(state) for state in ("done", "diverged")}
        print(", ".join(f"{number} {state}" for state, number in counts.items()))

    def run(self, with_test: bool, lock: int) -> int:
        """Runs what is not done, then what is held back if that is asked for; the exit status."""
        self._look_up()  # Once more: another one may just have ended.
        now = [job for job in self._jobs if not job.held_back]
        held_back = [job for job in self._jobs if job.held_back]
        if with_test and not held_back:
            raise ConfigError("--test: no stage is held back; set held_back on the evaluation of the test split")
        status = self._run(now, lock)
        failed = [job for job in now if self._found[job] == "failed"]
        if with_test and not status and failed:
            _say(f"the test split is not looked at: {len(failed)} stages failed")
        elif with_test and not status:
            note_test_look(self._config.out, self._grid)
            status = self._run(self._jobs, lock)
        text = self.write_table()
        if status:
            _say("the same command goes on")
            return status
        print(text)
        return self._worst()

    def write_table(self) -> str:
        """Writes table and page; returns the table as text, with where they are."""
        config = self._config
        table, look = self._table(), read_test_look(config.out)
        looked_at = look.looked_at if look else ""
        ends = {job.title: ending for job in self._jobs if (ending := fate(job, self._found))}
        values = {
            "title": config.title,
            "grid": self._grid,
            "test_looked_at": looked_at,
            **table.to_json(),
            "open": ends,
        }
        text = table_text(table)
        write_aside(config.out / TABLE_FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        write_aside(config.out / TEXT_FILE, text)
        write_aside(config.out / PAGE_FILE, page_html(config, table, looked_at))
        return f"{text}\nwritten: {', '.join(str(config.out / name) for name in (TABLE_FILE, TEXT_FILE, PAGE_FILE))}"

    def _table(self) -> Table:
        was_looked_at = read_test_look(self._config.out) is not None
        return make_table(self._config, self._jobs, self._found, _result_of, was_looked_at)

    def _run(self, jobs: Sequence[Job], lock: int) -> int:
        seconds: dict[str, list[float]] = {}
        for job in self._jobs:
            if (record := self._records[job]) and record.state == "done":
                seconds.setdefault(job.stage, []).append(record.seconds)
        return Runner(jobs, self._found, seconds, self._config.jobs, lock, _say, self._check_figures).run()

    def _check_figures(self, job: Job) -> None:
        """A measure that names no figure is told with the first result, and does not end the other runs."""
        if self._found[job] == "done" and any(measure.stage == job.stage for measure in self._config.measures):
            try:
                self._table()
            except ConfigError as error:
                _say_once(f"error: {error}")

    def _worst(self) -> int:
        """Of the stages that failed; a run that diverged is an outcome, and told in the table."""
        for job in self._jobs:
            if self._found[job] == "failed" and (record := read_record(job)):
                return record.status if record.status > 0 else HARDWARE
        return 0


def _result_of(job: Job) -> Mapping[str, Any]:
    return read_result(Path(job.output))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@cache
def _say_once(text: str) -> None:
    _say(text)
