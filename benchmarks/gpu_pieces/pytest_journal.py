"""A plugin of pytest that keeps a journal of the tests: ``pytest -p benchmarks.gpu_pieces.pytest_journal``.

The file is named by ``--journal FILE``. Tests that it has already are not run again.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_pieces.journal import Journal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="file that says how each test ended")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--journal"):
        config.pluginmanager.register(_Writer(Journal(path)))


class _Writer:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known = {outcome.name for outcome in journal.read().outcomes}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as one test."""
        if report.passed or report.nodeid in self._known:
            return
        if report.skipped:
            self._journal.announce([report.nodeid])
            self._journal.end(report.nodeid, "left out", _reason(report.longrepr))
            return
        text = str(report.longrepr)
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")] or [text.strip()]
        missing = next((line for line in lines if line.startswith("ModuleNotFoundError")), None)
        is_dali = any("is not installed" in line for line in lines)
        self._journal.announce([report.nodeid])
        self._journal.end(report.nodeid, "left out" if missing or is_dali else "failed", missing or lines[0])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = [item for item in items if item.nodeid not in self._known]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._known])
        items[:] = wanted
        self._journal.announce([item.nodeid for item in wanted])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._journal.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down the first that is not well; each may be the last that is heard."""
        if report.failed:
            self._note(report.nodeid, "failed", _cause(report.longrepr))
        elif report.skipped:
            self._note(report.nodeid, "left out", _reason(report.longrepr))
        elif report.when == "teardown":
            rates = ", ".join(f"{name} {value:,.0f}" for name, value in report.user_properties)
            self._note(report.nodeid, "done", rates)

    def _note(self, nodeid: str, state: Any, why: str) -> None:
        if nodeid not in self._known:
            self._known.add(nodeid)
            self._journal.end(nodeid, state, why)


def _reason(longrepr: Any) -> str:
    reason = longrepr[2] if isinstance(longrepr, tuple) else longrepr
    return str(reason).removeprefix("Skipped: ")


def _cause(longrepr: Any) -> str:
    """The line that pytest shows in its summary."""
    crash = getattr(longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(longrepr).strip().splitlines()[-1]
