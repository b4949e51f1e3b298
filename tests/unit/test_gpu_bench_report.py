"""The whole GPU benchmark: what it says, writes and returns, with pieces that take no time."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.gpu_pieces import environment, report
from benchmarks.gpu_pieces.journal import Outcome
from benchmarks.harness import Row, Target

GPU = {
    "name": "NVIDIA H200",
    "count": 1,
    "memory_gib": 139.8,
    "compute_capability": "9.0",
    "cuda": "13.0",
    "nccl": "2.28.9",
    "driver": {"driver_version": "580.159.03"},
}
FOUND = {
    "machine": {"system": "Linux", "cpu": "a CPU", "num_cores": 16.0, "memory_gib": 128.0, "gpus": []},
    "versions": {
        "python": "3.12.3",
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "nvidia-dali-cuda130": "2.4.0",
    },
    "commit": "abc",
    "gpu": GPU,
    "missing": {"ray": "shards"},
}
ROW = Row(
    name="step, bf16 | compiled",
    value=400.0,
    unit="TFLOP/s",
    limit=800.0,
    limit_of="matrix product",
    target=Target(at_least=0.6, of="ratio"),
    details={"clips/s": 1234.5},
)
SCRIPT = """
import sys
from pathlib import Path
from benchmarks.gpu_pieces.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.announce(["part"])
journal.begin("part")
{}
journal.end("part", {!r}, "why")
"""


def done(piece, *outcomes):
    return report.Done(piece=piece, outcomes=outcomes, seconds=12.34, allowed_s=50)


PIECES = [
    done(
        "tests",
        Outcome(name="test_a", state="done", why="frames_per_s 20,000"),
        Outcome(name="test_b", state="failed", why="assert 1 == 2"),
        Outcome(name="test_c", state="left out", why="no encoder libx265"),
        Outcome(name="test_d", state="left out", why="no encoder libx265"),
    ),
    done(
        "step",
        Outcome(name="good", state="done", rows=[ROW.as_json()]),
        Outcome(name="bad", state="failed", why="RuntimeError: CUDA error"),
    ),
    done("decode", Outcome(name="decode", state="left out", why="needs nvidia, which is not installed")),
]


def test_the_result_has_rows_tests_and_what_is_missing():
    found = report.result(FOUND, PIECES, "cuda", False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"benchmark", "machine", "versions", "commit", "rows"} <= found.keys()
    assert found["rows"] == [{"piece": "step", **ROW.as_json()}]
    assert found["not_measured"] == [
        {"piece": "step", "name": "bad", "state": "failed", "why": "RuntimeError: CUDA error"},
        {"piece": "decode", "name": "decode", "state": "left out", "why": "needs nvidia, which is not installed"},
    ]
    assert found["tests"] == {
        "done": 1,
        "failed": 1,
        "left_out": 2,
        "failures": [{"name": "test_b", "why": "assert 1 == 2"}],
        "left_out_because": {"no encoder libx265": 2},
        "figures": {"test_a": "frames_per_s 20,000"},
    }
    assert found["pieces"][1] == {
        "name": "step",
        "seconds": 12.3,
        "allowed_s": 50,
        "done": 1,
        "failed": 1,
        "left_out": 0,
    }


def test_the_table_says_all_of_it():
    text = report.table(report.result(FOUND, PIECES, "cuda", False))
    assert text.startswith("# Measured on NVIDIA H200\n")
    assert "Driver 580.159.03, CUDA 13.0, compute capability 9.0, 139.8 GiB, NCCL 2.28.9." in text
    assert (
        "| step, bf16 \\| compiled | 0.5 | 400 | 800 | TFLOP/s | matrix product | - | >= 0.6 of the limit | NO "
        "| clips/s 1,234 |" in text
    )
    assert "| bad | - | failed: RuntimeError: CUDA error |" in text
    assert "Tests: 1 passed, 1 failed, 2 left out." in text
    assert "- left out, 2: no encoder libx265" in text
    tables = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")]
    assert set(tables) == {11, 7}, "all lines of a table have as many columns"


def test_only_failures_make_it_fail():
    assert report.has_failed(PIECES)
    assert not report.has_failed(PIECES[2:])


def test_other_versions_are_named():
    assert environment.differences(FOUND) == []
    other = {**FOUND, "versions": {"python": "3.12.3", "torch": "2.110.0"}, "gpu": {**GPU, "cuda": "12.8"}}
    assert environment.differences(other) == [
        "torch 2.110.0; this is made for 2.11",
        "cuda 12.8; this is made for 13.0",
        "transformers is missing; this is made for 5.17",
        "nvidia-dali-cuda130 is missing; this is made for 2.4",
    ]


def test_the_answer_of_the_driver():
    text = "NVIDIA A100-SXM4-80GB, 550.54.15, 81920 MiB\nNVIDIA A100-SXM4-80GB, 550.54.15, 81920 MiB\n"
    names = ("name", "driver_version", "memory.total")
    found = environment.parse_driver(text, names)
    assert found == {"name": "NVIDIA A100-SXM4-80GB", "driver_version": "550.54.15", "memory.total": "81920 MiB"}
    assert environment.parse_driver("No devices were found\n", names) == {}
    assert environment.parse_driver("", names) == {}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the whole with one piece whose part ends as it is told; gives the status and what was written."""

    def run(*options, found=FOUND, state="done", code=""):
        monkeypatch.setattr(environment, "ask", lambda seconds, variables: found)
        monkeypatch.setattr(
            gpu, "command_of", lambda piece, arguments, journal: [sys.executable, "-c", script, str(journal)]
        )
        script = SCRIPT.format(code, state)
        out = tmp_path / "out"
        status = gpu.main(["--out", str(out), *options])
        path = out / "gpu.json"
        return status, json.loads(path.read_text()) if path.is_file() else None

    return run


@pytest.mark.parametrize(("state", "expected"), [("done", 0), ("left out", 0), ("failed", 1)])
def test_the_status_and_the_files_of_a_run(run, tmp_path, state, expected):
    status, written = run("--only", "limits", state=state)
    assert status == expected
    assert [piece["name"] for piece in written["pieces"]] == ["limits"]
    assert (tmp_path / "out/gpu.md").read_text().startswith("# Measured on NVIDIA H200")
    assert (tmp_path / "out/limits.log").is_file()


def test_pieces_without_time_are_left_out(run):
    status, written = run("--minutes", "0.1")
    assert status == 0
    assert {piece["name"] for piece in written["not_measured"]} > {"limits", "step", "decode", "collectives"}
    assert {piece["why"] for piece in written["not_measured"] if piece["piece"] != "collectives"} == {"no time"}


def test_tests_need_pytest(run):
    missing = {"pytest_timeout": "the tests"}
    status, written = run("--only", "tests", found={**FOUND, "missing": missing})
    assert status == 0
    assert written["tests"]["left_out_because"] == {"needs pytest_timeout, which is not installed": 1}


@pytest.mark.parametrize(
    ("options", "found", "message"),
    [
        (["--device", "cpu"], FOUND, "add --quick"),
        ([], {**FOUND, "gpu": None}, "no GPU"),
    ],
)
def test_what_cannot_be_begun_is_refused(run, capsys, options, found, message):
    assert run(*options, found=found) == (2, None)
    assert message in capsys.readouterr().err


def test_a_probe_that_fails_or_hangs_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu.main([]) == 2
    assert "PyTorch cannot be used here" in capsys.readouterr().err


def test_what_is_known_is_written_when_it_is_asked_to_end(run, tmp_path):
    ask = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    with pytest.raises(SystemExit, match="143"):
        run("--only", "limits", "step", code=ask)
    written = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [(one["piece"], one["state"], one["why"]) for one in written["not_measured"]] == [
        ("limits", "left out", "interrupted"),
        ("step", "left out", "interrupted"),
    ]


def test_the_processes_get_what_they_need():
    arguments = gpu._parser().parse_args(["--device", "cpu", "--quick"])
    tests, limits, *_ = gpu.PIECES
    assert gpu.command_of(limits, arguments, "j")[1:] == [
        *["-m", "benchmarks.gpu_pieces.piece", "limits", "--device", "cpu", "--quick", "--journal", "j"]
    ]
    assert "tests/gpu" in gpu.command_of(tests, arguments, "j")
    assert gpu.child_environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert gpu.child_environment("cuda")["HF_HUB_OFFLINE"] == "1"
