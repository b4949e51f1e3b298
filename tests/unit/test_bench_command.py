"""`alpro bench`: the list, one benchmark, and all of them with one table."""

import json
from pathlib import Path

import pytest

from alpro_launch import bench
from alpro_launch.cli import main
from alpro_stream.exit_status import CONFIGURATION

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''"""How fast {name} is: `python benchmarks/{name}.py`. More of it."""
import sys
from pathlib import Path
from benchmarks.harness import Row, Target, save

if __name__ == "__main__":
    assert sys.argv[1:3] == ["--quick", "--json"]
    row = Row(name="rate of {name}", value=1.0, unit="x", target=Target(at_least=2))
    save(Path(sys.argv[3]), {{"benchmark": "{name}", "rows": [row.as_json()]}})
'''


BROKEN = '''"""Cannot be run."""
from benchmarks.harness import Row

if __name__ == "__main__":
    raise SystemExit(2)
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with two benchmarks, one that breaks, and what is none."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("alpha", "beta"):
        (folder / f"{name}.py").write_text(SCRIPT.format(name=name))
    (folder / "broken.py").write_text(BROKEN)
    (folder / "tool.py").write_text('"""No benchmark."""\n')
    (folder / "summary.py").symlink_to(ROOT / "benchmarks/summary.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--list"]])
def test_all_are_listed_with_a_line_each(checkout, arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["alpha", "beta", "broken", "all"]
    assert lines[0] == "alpha   How fast alpha is"


def test_those_of_the_project_say_what_they_measure():
    known = bench.known_benchmarks(ROOT / "benchmarks")
    assert {"checkpoint", "decode", "demo", "end_to_end", "evaluate", "plan", "prompter", "shard"} <= known.keys()
    assert not {"harness", "readme", "corpus", "literal", "summary"} & known.keys()
    for name, text in known.items():
        assert len(text) > 15, name
        assert "`python" not in text
    assert all(len(line) <= 120 for line in bench.listing(known).splitlines())


def test_outside_of_a_checkout_nothing_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["bench"], ["bench", "all"], ["bench", "alpha"]):
        assert main(arguments) == CONFIGURATION
        assert "run this in the folder of a checkout (the wheel has no benchmarks)" in capsys.readouterr().err


def test_all_run_one_after_the_other_and_end_with_one_table(checkout, capfd):
    assert main(["bench", "all", "--quick", "--json", "out"]) == 2, "the status of the one that could not be run"
    shown = capfd.readouterr()
    assert [file.name for file in sorted((checkout / "out").iterdir())] == ["alpha.json", "beta.json"]
    assert json.loads((checkout / "out/beta.json").read_text())["benchmark"] == "beta"
    assert "broken (3 of 3)" in shown.out
    table = shown.out[shown.out.index("all benchmarks") :]
    assert [line.split("│")[2].strip() for line in table.splitlines() if line.startswith("│")] == [
        "rate of alpha",
        "rate of beta",
    ]
    assert shown.err.splitlines()[-1] == "broken ended with status 2"


def test_results_of_an_earlier_time_are_not_shown_as_if_measured_now(checkout, capfd):
    (checkout / "out").mkdir()
    row = {"name": "long ago", "value": 1.0, "unit": "x", "ratio": None, "limit": None, "target": None, "ok": None}
    (checkout / "out/broken.json").write_text(json.dumps({"benchmark": "broken", "rows": [row]}))
    assert main(["bench", "all", "--quick", "--json", "out"]) == 2
    assert "long ago" not in capfd.readouterr().out
    assert json.loads((checkout / "out/broken.json").read_text())["rows"] == [row], "it was not measured again"


@pytest.mark.parametrize("name", ["tool", "summary", "../benchmarks/alpha", "nothing"])
def test_what_is_no_benchmark_is_not_run(checkout, name, capsys):
    assert main(["bench", name]) == CONFIGURATION
    assert f"no benchmark {name} here" in capsys.readouterr().err


def test_flags_that_not_every_benchmark_has_are_refused(checkout, capsys):
    for flag in ("--clips", "--qui"):  # One that is cut short would not be handed on.
        with pytest.raises(SystemExit) as ended:
            main(["bench", "all", flag])
        assert ended.value.code == 2
        assert flag in capsys.readouterr().err
