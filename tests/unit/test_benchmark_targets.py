"""One table of all promises, with a reason beside each that is not kept."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import readme, tuning
from benchmarks.harness import Row, Target, results
from benchmarks.summary import summary
from benchmarks.targets import load_reasons, markdown, problems, promises

ROWS = [
    Row(name="fast", value=9.0, unit="s", limit=3.0, limit_of="copy", target=Target(at_most=4, of="ratio")),
    Row(name="slow", value=1234.0, unit="clips/s", target=Target(at_least=2000)),
    Row(name="free", value=1.0, unit="x"),
    Row(name="beside", value=1.0, unit="x", limit=2.0),
]
RESULTS = {"one": results("one", ROWS)}
REASON = {"one": {"slow": {"why": "It is\nold.", "close": "A new one."}}}


def test_committed_results_have_a_reason_for_each_missed_target_and_no_other():
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in readme.RESULTS.glob("*.json")}
    assert problems(found, load_reasons()) == []


def test_every_row_with_a_target_has_a_line():
    lines = markdown(RESULTS, REASON).splitlines()
    assert lines[0] == "1 of 2 targets are kept."
    assert lines[4:6] == [
        "| one: fast | 3.00 | 9 s | 3 (copy) | <= 4 of the limit | yes | `alpro bench one` |",
        "| one: slow |  | 1,234 clips/s |  | >= 2000 | **no** | `alpro bench one` |",
    ]
    assert lines[-1] == "- **one: slow** (>= 2000, 1,234 clips/s). It is old. *To close it:* A new one."


def test_what_falls_short_for_one_reason_is_one_line():
    rows = [Row(name=name, value=1.0, unit="s", target=Target(at_most=0.5)) for name in ("a", "b")]
    reasons = {"one": dict.fromkeys("ab", REASON["one"]["slow"])}
    text = markdown({"one": results("one", rows)}, reasons)
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


def test_charts_are_of_what_was_measured():
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in readme.RESULTS.glob("*.json")}
    chart = readme.stream_chart(found)
    for row in found["stream"]["rows"]:
        assert (f">{row['name']}<" in chart) == (row["unit"] == "clips/s" and not row["name"].startswith("raw"))
    assert chart.index(">webdataset-turbo<") < chart.index(">decord<"), "fastest first"
