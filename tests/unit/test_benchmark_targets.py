"""One table of all promises, with a reason beside each that is not kept."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import readme, settings, tuning
from benchmarks.gpu_pieces import decode, end_to_end, prompter, step, step_compiled
from benchmarks.gpu_pieces.piece import Setting
from benchmarks.harness import Measurement, Row, Target, results
from benchmarks.summary import summary
from benchmarks.targets import load_reasons, load_unmeasured, markdown, problems, promises, waiting

ROWS = [
    Row(name="fast", value=9, unit="s", spread=0.078, limit=3, limit_of="copy", target=Target(at_most=4, of="ratio")),
    Row(name="slow", value=1234.0, unit="clips/s", target=Target(at_least=2000)),
    Row(name="free", value=1.0, unit="x"),
    Row(name="beside", value=1.0, unit="x", limit=2.0),
]
RESULTS = {"one": results("one", ROWS)}
REASON = {"one": {"slow": {"why": "It is\nold.", "close": "A new one."}}}
NOTHING = {"rows": []}
UNMEASURED = {
    "why": "No GPU.",
    "close": "One.",
    "rows": [
        {"name": "here", "target": {"of": "ratio", "at_least": 0.5}, "limit_of": "copy"},
        {"name": "there", "target": {"of": "value", "at_most": 2}},
    ],
}
ON_GPU = Setting(torch.device("cuda"), is_quick=False)


def test_committed_results_have_a_reason_for_each_missed_target_and_no_other():
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in readme.RESULTS.glob("*.json")}
    assert problems(found, load_reasons()) == []


def test_committed_results_are_of_a_commit_and_name_their_limits():
    for file in readme.RESULTS.glob("*.json"):
        found = json.loads(file.read_text(encoding="utf-8"))
        assert not found["commit"].endswith("+dirty"), file
        unnamed = [row["name"] for row in found["rows"] if row["limit"] is not None and not row.get("limit_of")]
        assert unnamed == [], file


def test_every_row_with_a_target_has_a_line():
    lines = markdown(RESULTS, REASON, NOTHING).splitlines()
    assert lines[0] == "1 of 2 targets are kept."
    assert lines[4:6] == [
        "| one: fast | 3.00 | 9 s | 8 % | 3 (copy) | <= 4 of the limit | yes | `alpro bench one` |",
        "| one: slow |  | 1,234 clips/s |  |  | >= 2000 | **no** | `alpro bench one` |",
    ]
    assert lines[-1] == "- **one: slow** (>= 2000, 1,234 clips/s). It is old. *To close it:* A new one."


def test_what_needs_a_gpu_has_a_line_until_it_is_measured():
    text = markdown(RESULTS, REASON, UNMEASURED)
    assert text.startswith("1 of 2 targets are kept, 2 more need a GPU and are not measured.")
    assert "| gpu: here |  | - |  | - (copy) | >= 0.5 of the limit | not measured | `bash benchmarks/gpu.sh` |" in text
    assert text.splitlines()[-1] == (
        "- **gpu: here** (>= 0.5 of the limit, not measured); **gpu: there** (<= 2, not measured). "
        "No GPU. *To close it:* One."
    )
    toy = [Row(name=name, value=1.0, unit="x") for name in ("here", "there")]
    assert len(waiting({"gpu": results("gpu", toy)}, UNMEASURED)) == 2, "nothing is promised at toy size"
    row = Row(name="here", value=0.6, unit="x", limit=1.0, target=Target(at_least=0.5, of="ratio"))
    text = markdown({"gpu": results("gpu", [row])}, {}, UNMEASURED)
    assert text.startswith("1 of 1 targets are kept, 1 more need a GPU and are not measured.")
    assert "| gpu: here | 0.60 | 0.6 x |  | 1 | >= 0.5 of the limit | yes | `bash benchmarks/gpu.sh` |" in text
    assert text.count("gpu: here") == 1


def test_targets_that_need_a_gpu_are_those_of_its_benchmark(monkeypatch):
    expected = {row["name"]: (row["target"], row.get("limit_of", "")) for row in load_unmeasured()["rows"]}
    assert {row.name: (row.target.as_json(), row.limit_of) for row in gpu_rows(monkeypatch) if row.target} == expected


def gpu_rows(monkeypatch):
    """What the pieces with targets write, with nothing measured."""
    beside = SimpleNamespace(without_labels=None, inline=None, process=None)
    beside.labels = beside.inline_labels = beside.waits = [1.0, 1.0]
    operations = SimpleNamespace(step=1e12)
    built = SimpleNamespace(ours=lambda: None, literal=None, operations=operations)
    built.sample = lambda run: {"rate": 1.0, "ratio": 1.0}
    line = {"step_s": 1.0, "data_wait_percent": 1.0, "prompter_wait_percent": 1.0}
    for piece in (decode, prompter, step_compiled):
        monkeypatch.setattr(piece, "measure", lambda variants, _: dict.fromkeys(variants, Measurement((1.0,))))
    for piece in (end_to_end, prompter, step):
        monkeypatch.setattr(piece, "peak_gib", lambda device: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    monkeypatch.setattr(step_compiled, "build", lambda setting, case: built)
    monkeypatch.setattr(prompter, "Bench", lambda arguments: nullcontext(beside))
    monkeypatch.setattr(decode, "build_decoder", lambda *arguments: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(decode, "_pipeline", lambda *arguments: None)
    monkeypatch.setattr(end_to_end, "write_shards", lambda folder, is_quick: "example clips")
    monkeypatch.setattr(end_to_end.Bench, "_write_prompter", lambda bench: None)
    monkeypatch.setattr(end_to_end, "train_without_saving", lambda config, num_steps: None)
    monkeypatch.setattr(end_to_end, "read_metrics", lambda folder: 9 * [line])
    parts = [part for piece in (step_compiled, prompter, end_to_end) for part in piece.parts(ON_GPU).values()]
    return [*(row for part in parts for row in part()), *decode.frames(ON_GPU, 4 * [b""])]


def test_what_falls_short_for_one_reason_is_one_line():
    rows = [Row(name=name, value=1.0, unit="s", target=Target(at_most=0.5)) for name in ("a", "b")]
    reasons = {"one": dict.fromkeys("ab", REASON["one"]["slow"])}
    text = markdown({"one": results("one", rows)}, reasons, NOTHING)
    assert text.count("It is old.") == 1
    assert "**one: a** (<= 0.5, 1 s); **one: b** (<= 0.5, 1 s). It is old." in text


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (REASON, []),
        ({}, ["one: slow: the target is missed"]),
        ({"one": {"slow": {"why": "It is old."}}}, ["one: slow: the target is missed"]),
        (REASON | {"two": {"slow": {}}}, ["two: slow: missed.yaml explains what is no row with a target"]),
        ({"one": REASON["one"] | {"free": {}}}, ["one: free: missed.yaml explains what is no row"]),
    ],
)
def test_reasons_and_missed_targets_belong_together(reasons, expected):
    found = problems(RESULTS, reasons)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_a_result_without_a_number_is_not_kept():
    rows = [Row(name="x", value=float("nan"), unit="s", target=Target(at_most=1))]
    (promise,) = promises({"one": results("one", rows)})
    assert (promise.measured, promise.kept) == ("- s", False)


def test_the_table_of_all_benchmarks_leaves_out_what_has_neither_target_nor_limit(capsys):
    Console(width=200).print(summary(RESULTS))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["fast", "slow", "beside"]
    assert [line.split("│")[-2].strip() for line in lines] == ["yes", "NO", "-"]
    assert [line.split("│")[3].strip() for line in lines] == ["3.00", "-", "0.50"]


def test_settings_are_compared_the_right_way_round(monkeypatch):
    pairs = [("s", 2.0, 8.0), ("clips/s", 8.0, 2.0)]
    for unit, mine, other in pairs:
        rows = [Row(name="mine", value=mine, unit=unit), Row(name="other", value=other, unit=unit)]
        monkeypatch.setattr(tuning, "SETTINGS", (tuning.Setting("`a=1`", "`2`", "one", "mine", "other"),))
        assert tuning.settings({"one": results("one", rows)}).splitlines()[-1].endswith(f"{unit} (`one`) | 4 |")
    assert len(tuning.settings({}).splitlines()) == 2


def test_settings_name_rows_that_benchmarks_write():
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in readme.RESULTS.glob("*.json")}
    for one in tuning.SETTINGS:
        if one.benchmark in found:
            assert {one.row, one.other} <= {row["name"] for row in found[one.benchmark]["rows"]}, one
    assert {one.benchmark for one in tuning.SETTINGS} <= {file.stem for file in Path("benchmarks").glob("*.py")}


def test_settings_of_a_training_name_rows_that_are_measured():
    assert tuning.TRAINING.keys() == settings.VARIANTS.keys() - {settings.DEMO, settings.TWO_RANKS}
    found = dict.fromkeys(settings.VARIANTS, Measurement((3.0, 4.0))) | {settings.DEMO: Measurement((2.0, 4.0))}
    rows = [settings._row(name, found, 1.0) for name in settings.VARIANTS]
    shown = tuning.training_settings({"settings": results("settings", rows)})
    assert "| `prompter.placement=inline` | `process` | 1.25 ± 0.12 | 3.5 against 3 | 1 against 1 |" in shown
    assert tuning.training_settings({}) == "Not measured yet."


def test_charts_are_of_what_was_measured():
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in readme.RESULTS.glob("*.json")}
    chart = readme.stream_chart(found)
    for row in found["stream"]["rows"]:
        assert (f">{row['name']}<" in chart) == (row["unit"] == "clips/s" and not row["name"].startswith("raw"))
    assert chart.index(">webdataset-turbo<") < chart.index(">decord<"), "fastest first"
