"""The benchmark harness: fair interleaving, targets, the file it writes, its exit status."""

import json
import math
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from alpro_stream.errors import ShardError
from alpro_stream.exit_status import INTERRUPTED
from benchmarks import machine
from benchmarks.harness import Measurement, Row, Target, measure, quotients, results, run

ROOT = Path(__file__).resolve().parents[2]


def test_variants_are_interleaved_and_take_turns_to_start():
    calls = []
    variants = {name: lambda name=name: float(len(calls.append(name) or calls)) for name in "abc"}

    measured = measure(variants, repetitions=3, warmup=2)

    rounds = ["".join(calls[start : start + 3]) for start in range(0, 15, 3)]
    assert all(sorted(done) == ["a", "b", "c"] for done in rounds)
    assert [done[0] for done in rounds[2:]] == ["a", "b", "c"]
    assert measured["a"].samples == (7.0, 12.0, 14.0), "the samples of the warm-up are dropped"


def test_median_and_spread():
    assert Measurement((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3
    assert Measurement((1.0, 2.0, 3.0, 4.0, 100.0)).spread == pytest.approx(2 / 3)
    assert Measurement((5.0,)).spread is None
    assert Measurement((0.0, 0.0)).spread is None


def test_quotients_are_of_samples_of_the_same_round():
    assert quotients(Measurement((2.0, 8.0, 30.0)), Measurement((1.0, 2.0, 3.0))).samples == (2.0, 4.0, 10.0)
    with pytest.raises(ValueError, match="shorter"):
        quotients(Measurement((1.0, 2.0)), Measurement((1.0,)))


@pytest.mark.parametrize(("repetitions", "variants"), [(0, {"a": float}), (1, {})])
def test_nothing_to_measure_is_an_error(repetitions, variants):
    with pytest.raises(ValueError, match="expected at least one variant and one repetition"):
        measure(variants, repetitions=repetitions)


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        (None, None),
        (Target(at_least=80), True),
        (Target(at_least=80.1), False),
        (Target(at_most=80), True),
        (Target(at_most=79), False),
        (Target(at_least=0.5, of="ratio"), True),
        (Target(at_least=0.51, of="ratio"), False),
        (Target(at_most=0.0), False),
    ],
)
def test_ok_follows_from_the_target_and_its_direction(target, kept):
    assert Row(name="x", value=80, unit="clips/s", limit=160, target=target).ok is kept


def test_a_missing_limit_or_a_nan_never_keeps_a_target():
    promise = Target(at_least=0.0, of="ratio")
    assert Row(name="x", value=1, unit="s").ratio is None
    assert Row(name="x", value=1, unit="s", limit=0).ratio is None
    assert Row(name="x", value=1, unit="s", target=promise).ok is False
    assert Row(name="x", value=math.nan, unit="s", target=Target(at_most=9)).ok is False


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_target_has_exactly_one_bound(bounds):
    with pytest.raises(ValueError, match="one bound"):
        Target(**bounds)


def test_written_file_has_the_agreed_keys(tmp_path, capsys):
    row = Row.of("decode", Measurement((4.0, 6.0)), "clips/s", Measurement((10.0,)), Target(at_least=0.9, of="ratio"))
    infinite = Row(name="bad", value=math.inf, unit="s")
    path = tmp_path / "new" / "result.json"

    assert run("sample", lambda _: [row, infinite], argv=["--json", str(path)]) == 0

    written = json.loads(path.read_text())
    assert list(written) == ["benchmark", "machine", "versions", "commit", "rows"]
    assert written["benchmark"] == "sample"
    assert written["rows"][0] == {
        "name": "decode",
        "value": 5.0,
        "unit": "clips/s",
        "spread": 0.2,
        "limit": 10.0,
        "ratio": 0.5,
        "target": {"of": "ratio", "at_least": 0.9},
        "ok": False,
    }
    assert written["rows"][1]["value"] is None
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    shown = next(line for line in capsys.readouterr().out.splitlines() if "decode" in line)
    assert shown.split("│")[1:5] == [" decode ", "         0.50 ", "     5 ", "    10 "]
    assert "NO" in shown


def test_what_was_measured_on_is_printed_and_written(tmp_path, capsys):
    path = tmp_path / "result.json"
    content = {"clips": 3, "median_size": "640x360"}
    assert run("sample", lambda _: [], argv=["--json", str(path)], describe_content=lambda _: content) == 0
    assert json.loads(path.read_text())["content"] == content
    assert "measured on: clips 3, median_size 640x360" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "value", "status"), [([], 1, 0), (["--check"], 1, 1), (["--check"], 3, 0)])
def test_a_missed_target_fails_only_when_asked(argv, value, status):
    rows = [Row(name="x", value=value, unit="s", target=Target(at_least=2)), Row(name="y", value=0, unit="s")]
    assert run("sample", lambda _: rows, argv=argv) == status


def test_an_error_of_the_library_is_one_message(capsys, tmp_path):
    def broken(_):
        raise ShardError("no shards in [somewhere]")

    assert run("sample", broken, argv=["--json", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.strip() == "error: no shards in [somewhere]"
    assert not (tmp_path / "x.json").exists()


def test_where_nothing_can_be_written_nothing_is_measured(capsys, tmp_path):
    def never(_):
        raise AssertionError("measured")

    (tmp_path / "file").touch()
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "file/x.json", "File exists")):
        assert run("sample", never, argv=["--json", str(path)]) == 2
        assert capsys.readouterr().err.split() == (
            f"error: --json {path}: the results cannot be written there ({why})".split()
        )


def test_quick_results_say_so(tmp_path):
    path = tmp_path / "x.json"
    assert run("sample", lambda _: [], argv=["--quick", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["quick"] is True


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, INTERRUPTED)])
def test_asked_to_end_it_leaves_nothing_behind(tmp_path, number, status):
    script = tmp_path / "sample.py"
    script.write_text(
        "import subprocess, sys, tempfile\n"
        "from benchmarks.harness import run\n"
        "def rows(_):\n"
        "    with tempfile.TemporaryDirectory(prefix='kept-') as folder:\n"
        "        code = f'print({folder!r}, flush=True); import time; time.sleep(60)'\n"
        "        subprocess.run([sys.executable, '-c', code])\n"
        "sys.exit(run('sample', rows, argv=[]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        [child] = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(30) == status
    assert not folder.exists()
    assert not child.is_running()


def test_own_arguments_and_quick_reach_the_benchmark():
    seen = {}
    run(
        "sample",
        lambda arguments: seen.update(vars(arguments)) or [],
        lambda parser: parser.add_argument("--batch", type=int),
        ["--quick", "--batch", "7"],
    )
    assert seen["quick"] is True
    assert seen["batch"] == 7


def test_machine_is_described_without_private_names():
    described = machine.describe()
    text = json.dumps(results("sample", []))

    assert set(described) == {"system", "cpu", "num_cores", "memory_gib", "gpus"}
    assert 0 < described["num_cores"] <= (os.cpu_count() or 1)
    assert described["memory_gib"] > 0
    assert machine.versions()["python"] == platform.python_version()
    assert str(ROOT) not in text
    assert f'"{platform.node()}"' not in text


def test_container_limits_count(tmp_path):
    cpu, memory = tmp_path / "cpu.max", tmp_path / "memory.max"
    cpu.write_text("50000 100000\n")
    memory.write_text("1048576\n")
    assert machine._num_cores(cpu) == 0.5
    assert machine._memory_bytes(memory) == 2**20
    cpu.write_text("max 100000\n")
    memory.write_text("max\n")
    assert machine._num_cores(cpu) == len(os.sched_getaffinity(0))
    assert machine._memory_bytes(memory) > 2**20


def test_details_that_are_no_numbers_do_not_lose_the_results():
    rows = [Row(name="a", value=1.0, unit="x", details={"known": 2.0, "not": float("nan")})]
    text = json.dumps(results("n", rows), allow_nan=False)
    assert json.loads(text)["rows"][0]["details"] == {"known": 2.0, "not": None}


def test_commit_says_when_files_differ(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert machine.commit(tmp_path) == "unknown"
    git("init")
    assert machine.commit(tmp_path) == "unknown"
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one", "--no-verify")
    clean = machine.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    assert machine.commit(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path) == clean + "+dirty"


def test_a_script_outside_of_the_checkout_runs_without_importing_torch(tmp_path):
    script = tmp_path / "sample.py"
    script.write_text(
        "import sys\n"
        "from benchmarks.harness import Row, main\n"
        "assert 'torch' not in sys.modules\n"
        "main('sample', lambda arguments: [Row(name='x', value=1.0, unit='s')])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample" in done.stdout
