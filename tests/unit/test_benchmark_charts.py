"""Charts of results: lengths in proportion, limits where they belong, and an SVG that any reader takes."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from alpro_stream.pages.ablation_page import SpreadPlot, SpreadRow
from benchmarks.charts import Bar, bar_chart, bar_lines, spread_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_lines_are_full_up_to_the_limit_and_light_beyond():
    lines = bar_lines([Bar("forward", 80, limit=20), Bar("wait", 20), Bar("none", 0, limit=5)], "ms", width=8)
    assert [line.split()[-1] for line in lines[:2]] == ["██░░░░░░", "██"]
    assert lines[2].endswith("0.0 %")
    assert [re.search(r"([\d.]+) %", line)[1] for line in lines] == ["80.0", "20.0", "0.0"]


def test_lines_of_nothing_are_none():
    assert bar_lines([], "ms") == []
    assert bar_lines([Bar("a", 0.0)], "ms")[0].startswith("a")


def test_a_chart_has_bars_in_proportion_and_a_mark_at_the_limit():
    root = ElementTree.fromstring(bar_chart("Speed <here>", [Bar("a & b", 100, 50), Bar("c", 25, is_ours=True)], "ms"))
    first, second = root.findall(f"{SVG}rect")
    assert float(first.get("width")) == pytest.approx(4 * float(second.get("width")), abs=0.2)
    assert [bar.get("class") for bar in (first, second)] == ["bar", "ours"]
    (mark,) = (path for path in root.findall(f"{SVG}path") if path.get("class") == "limit")
    at = float(re.match(r"M([\d.]+) ", mark.get("d"))[1])
    assert at == pytest.approx(float(first.get("x")) + float(first.get("width")) / 2, abs=0.2)
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"Speed <here>", "a & b", "100", "25.0"} <= set(texts)


def test_names_and_values_stay_inside_of_the_picture():
    root = ElementTree.fromstring(bar_chart("t", [Bar("a very long name of a very slow variant", 7, 9)], "s", "it"))
    width = float(root.get("viewBox").split()[2])
    (rect,) = root.findall(f"{SVG}rect")
    assert float(rect.get("x")) > 200
    assert float(rect.get("x")) + float(rect.get("width")) < width - 40
    assert any(text.text == "s; red: it" for text in root.findall(f"{SVG}text"))


def test_spreads_show_seeds_means_and_deviations_and_leave_out_what_has_no_values():
    row = SpreadRow(name="all <four>", values=(10.0, 20.0, 30.0), mean=20.0, sd=10.0, text="20.0 ± 10.0")
    alone = SpreadRow(name="alone", values=(15.0,), mean=15.0, sd=None, text="15.0")
    empty = SpreadRow(name="none", values=(), mean=None, sd=None, text="-")
    plots = [SpreadPlot(name=name, unit="%", rows=rows) for name, rows in (("R@1", (row, alone)), ("lost", (empty,)))]
    root = ElementTree.fromstring(spread_chart("Losses", plots))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Losses", "R@1 (%)", "all <four>", "alone"} <= set(texts)
    assert "lost (%)" not in texts
    assert len(list(root.iter(f"{SVG}circle"))) == 2
    assert [path.get("class") for path in root.iter(f"{SVG}path")].count("whisker") == 1
    height = float(root.get("viewBox").split()[3])
    assert all(float(circle.get("cy")) < height for circle in root.iter(f"{SVG}circle"))
