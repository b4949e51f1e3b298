"""A piece of the GPU benchmark is ended when its time is over, and goes on behind parts that hang or crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_pieces.budget import PIECES, Piece, allowance
from benchmarks.gpu_pieces.journal import Journal
from benchmarks.gpu_pieces.running import broken_off, work_through

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu_pieces.journal import Journal
journal = Journal(Path(sys.argv[1]))
known = {outcome.name for outcome in journal.read().outcomes}
journal.announce(["a", "b", "c"])
for name in "abc":
    if name in known:
        continue
    journal.begin(name)
    if name == "b":
"""
TAIL = """
    journal.end(name, "done", rows=[{"name": name}])
"""


def work(tmp_path, in_b, seconds=20.0, stall_s=10.0):
    """Outcomes of a process with parts a, b and c, with something to do in b, as {name: (state, why)}."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + f"        {in_b}\n" + TAIL)
    journal = Journal(tmp_path / "piece")
    command = [sys.executable, str(script), str(journal.path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcomes = work_through(command, journal, tmp_path / "log", seconds, stall_s, environment)
    return {outcome.name: (outcome.state, outcome.why) for outcome in outcomes}


DONE = ("done", "")


def test_parts_that_are_done_keep_their_rows_and_order(tmp_path):
    assert work(tmp_path, "pass") == {"a": DONE, "b": DONE, "c": DONE}
    assert [one.rows for one in Journal(tmp_path / "piece").read().outcomes] == [[{"name": name}] for name in "abc"]


def test_behind_a_crash_it_goes_on(tmp_path):
    found = work(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert found == {"a": DONE, "b": ("failed", "was ended by SIGSEGV"), "c": DONE}


def test_what_ends_the_process_says_its_last_words(tmp_path):
    found = work(tmp_path, "sys.exit('the driver is gone')")
    assert found == {"a": DONE, "b": ("failed", "ended with status 1: the driver is gone"), "c": DONE}


def test_behind_a_part_that_hangs_it_goes_on(tmp_path):
    found = work(tmp_path, "time.sleep(60)", stall_s=3)
    assert found == {"a": DONE, "b": ("failed", "was given up after 3 s"), "c": DONE}


def test_when_its_time_is_over_the_rest_is_left_out(tmp_path):
    started = time.monotonic()
    found = work(tmp_path, "time.sleep(60)", seconds=4.0)
    assert time.monotonic() - started < 20
    assert found["a"] == DONE
    assert found["b"][0] == "failed"
    assert "when its time was over" in found["b"][1]
    assert found["c"] == ("left out", "no time")


def test_what_it_started_ends_with_it(tmp_path):
    child = "child = subprocess.Popen(['sleep', '300']); Path(sys.argv[1] + '.pid').write_text(str(child.pid)); "
    work(tmp_path, child + "time.sleep(60)", stall_s=3)
    pid = int((tmp_path / "piece.pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("code", ["raise SystemExit('no module torch')", "pass"])
def test_a_process_without_parts_is_a_failure_of_the_piece(tmp_path, code):
    journal = Journal(tmp_path / "decode")
    (outcome,) = work_through([sys.executable, "-c", code], journal, tmp_path / "log", 20, 10)
    assert (outcome.name, outcome.state) == ("decode", "failed")
    expected = "ended with status 1: no module torch" if code != "pass" else "it ended without doing anything"
    assert outcome.why == expected


def test_one_that_never_gets_to_its_first_part_is_not_started_for_ever(tmp_path):
    journal = Journal(tmp_path / "piece")
    journal.announce(["a", "b"])
    outcomes = work_through([sys.executable, "-c", "exit(3)"], journal, tmp_path / "log", 20, 10)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]


def test_a_line_that_was_cut_off_is_lost_alone(tmp_path):
    journal = Journal(tmp_path / "piece")
    journal.announce(["a", "b"])
    journal.begin("a")
    with journal.path.open("a") as file:
        file.write('{"ended": "a", "sta')
    assert journal.read().running == "a"
    journal.end("a", "failed", "first line\nsecond line")
    record = journal.read()
    assert [(one.name, one.state, one.why) for one in record.outcomes] == [("a", "failed", "first line")]
    assert (record.running, record.left) == (None, ["b"])


def test_the_time_is_divided_by_shares_and_what_is_not_used_goes_on():
    pieces = [Piece(name=name, share=share, fewest_s=5) for name, share in (("a", 30), ("b", 20), ("c", 50))]
    assert allowance(100, pieces) == 30
    assert allowance(100 - 10, pieces[1:]) == pytest.approx(90 * 20 / 70)  # a took 10
    assert allowance(40, pieces[2:]) == 40  # the last one has all that is left
    assert allowance(12, pieces) == 5  # more than its share, as that is too little to begin with
    assert allowance(4.9, pieces) is None


def test_all_pieces_fit_into_eight_minutes():
    left = 8 * 60 - 8
    for place in range(len(PIECES)):
        seconds = allowance(left, PIECES[place:])
        assert seconds is not None
        assert seconds >= PIECES[place].fewest_s
        left -= seconds
    assert left == pytest.approx(0)


def test_tests_keep_a_journal_too(tmp_path):
    """One that passes, fails, is skipped, ends the process; a file that needs what is not there."""
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(record_property): record_property('frames_per_s', 2345.6)\n"
        "def test_bad(): assert 1 == 2, 'wrong'\n"
        "def test_skipped(): pytest.skip('no CUDA device')\n"
        "def test_crash(): os.abort()\n"
        "def test_last(): pass\n"
    )
    (tmp_path / "test_other.py").write_text("import surely_not_installed\n")
    journal = Journal(tmp_path / "journal")
    plugin = ["-p", "benchmarks.gpu_pieces.pytest_journal", "--journal", str(journal.path)]
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", str(tmp_path), *options, *plugin]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    outcomes = work_through(command, journal, tmp_path / "log", 60, 30, environment)
    found = {outcome.name.split("::")[-1]: (outcome.state, outcome.why) for outcome in outcomes}
    assert found == {
        "test_other.py": ("left out", "ModuleNotFoundError: No module named 'surely_not_installed'"),
        "test_good": ("done", "frames_per_s 2,346"),
        "test_bad": ("failed", "AssertionError: wrong"),
        "test_skipped": ("left out", "no CUDA device"),
        "test_crash": ("failed", "was ended by SIGABRT"),
        "test_last": DONE,
    }


def test_a_shell_without_pytorch_is_told_so(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *"\'torch\'"*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(["bash", ROOT / "benchmarks/gpu.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "has no torch" in done.stderr


def test_the_command_runs_a_piece_and_writes_both_files(tmp_path):
    command = ["bash", ROOT / "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--only", "limits", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "cpu"
    assert [row["unit"] for row in written["rows"]] == ["TFLOP/s", "TFLOP/s", "GB/s", "GB/s"]
    assert "matrix product, bf16" in (tmp_path / "gpu.md").read_text()
    assert "matrix product, bf16" in done.stdout


def test_a_journal_that_is_broken_off_keeps_what_was_done(tmp_path):
    journal = Journal(tmp_path / "piece")
    journal.announce(["one", "two", "three"])
    journal.begin("one")
    journal.end("one", "done")
    journal.begin("two")
    assert [(one.name, one.state, one.why) for one in broken_off(journal)] == [
        ("one", "done", ""),
        ("two", "left out", "interrupted"),
        ("three", "left out", "interrupted"),
    ]


@pytest.mark.parametrize("flags", [["--minutes", "nan"], ["--minutes=-5"], ["--out", "README.md"]])
def test_what_could_measure_nothing_is_refused(flags):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--only", "limits", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "none between 0 and a day" in done.stderr or "cannot be written there (File exists)" in done.stderr
