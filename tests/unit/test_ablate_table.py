"""From outcomes and figures to table, text and page."""

import math

import pytest
from ablation_files import job_chain
from page_files import NASTY, Page

from alpro_launch.ablate.config import AblateConfig, Measure
from alpro_launch.ablate.markdown import table_text
from alpro_launch.ablate.page import page_html
from alpro_launch.ablate.table import figure, make_table, notes
from alpro_stream.errors import ConfigError


def config_of(**changes):
    tree = {
        "out": "out",
        "seeds": (0, 1, 2),
        "stages": {
            "train": {"command": "train", "config": "t"},
            "validation": {"command": "evaluate", "config": "e"},
            "test": {"command": "evaluate", "config": "e", "held_back": True},
        },
        "rows": [{"name": "small"}, {"name": "large"}],
        "measures": [
            {"name": "R@1", "stage": "validation", "key": "metrics.r1", "unit": "%"},
            {"name": "test R@1", "stage": "test", "key": "metrics.r1"},
        ],
        "choose": "R@1",
        "compare": {"baselines": ["small"]},
    }
    return AblateConfig.model_validate({**tree, **changes})


def table_of(config, figures, states, with_test=False):
    """A table of `figures` by row and seed; `states` are those of jobs that are not done."""
    jobs = [
        job
        for row in config.all_rows()
        for seed in config.seeds
        for job in job_chain(seed, row.name, [*config.stages], held_back={"test"})
    ]
    found = {}
    for job in jobs:
        after = found.get(job.after, "done")
        found[job] = states.get((job.row, job.seed, job.stage), "done" if after == "done" else "todo")
    return make_table(config, jobs, found, lambda job: {"metrics": {"r1": figures[job.row][job.seed]}}, with_test)


FIGURES = {"small": [70.0, 72.0, 74.0], "large": [75.0, 76.0, 82.0]}


def test_means_spreads_differences_and_choice():
    table = table_of(config_of(), FIGURES, {})
    cell = table.cells["small"]["R@1"]
    assert (cell.mean, cell.sd, cell.missing) == (72.0, 2.0, {})
    (one,) = table.comparisons
    assert one.paired.differences == {0: 5.0, 1: 4.0, 2: 8.0}
    assert (one.row, one.paired.same_sign, table.chosen) == ("large", True, "large")
    assert [measure.name for measure in table.measures] == ["R@1"], "the test split was not looked at"
    assert [m.name for m in table_of(config_of(), FIGURES, {}, with_test=True).measures] == ["R@1", "test R@1"]
    text = table_text(table)
    assert "72.0 ± 2.0" in text
    assert "large (chosen)" in text
    assert "+5.7 ± 2.1" in text


def test_a_run_that_diverged_is_told_marked_and_never_chosen():
    config = config_of()
    table = table_of(config, FIGURES, {("large", 1, "train"): "diverged"})
    cell = table.cells["large"]["R@1"]
    assert (cell.values, cell.missing) == ({0: 75.0, 2: 82.0}, {1: "diverged in train"})
    assert notes(table) == {("large", "R@1"): "2 of 3 seeds: seed 1 diverged in train"}
    assert table.comparisons[0].paired.differences == {0: 5.0, 2: 8.0}
    assert table.chosen == "small", "its mean is larger, but not of all seeds"
    text = table_text(table)
    (line,) = [line for line in text.splitlines() if line.startswith("| large ") and "[1]" in line]
    assert "78.5 ± 4.9 [1]" in line
    assert "- [1] 2 of 3 seeds: seed 1 diverged in train" in text
    page = " ".join(Page(page_html(config, table, "")).text)
    assert "78.5 ± 4.9 (2 of 3 seeds)" in page
    assert "large, R@1: 2 of 3 seeds: seed 1 diverged in train" in page


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ({("large", 1, "validation"): "failed"}, "failed in validation"),
        ({("large", 1, "train"): "todo"}, "not run"),
    ],
)
def test_why_a_value_is_missing(states, reason):
    table = table_of(config_of(), FIGURES, states)
    assert table.cells["large"]["R@1"].missing == {1: reason}
    assert table.chosen == ("" if reason == "not run" else "small")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_that_is_no_number_is_missing(value):
    table = table_of(config_of(), {**FIGURES, "large": [75.0, value, 82.0]}, {})
    assert table.cells["large"]["R@1"].missing == {1: "not finite in validation"}


def test_a_row_without_any_value_and_one_seed():
    states = {("large", seed, "train"): "diverged" for seed in range(3)}
    config = config_of()
    table = table_of(config, FIGURES, states)
    assert (table.cells["large"]["R@1"].mean, table.comparisons[0].paired.mean) == (None, None)
    assert "no value" in page_html(config, table, "")
    one = config_of(seeds=(2,))
    table = table_of(one, FIGURES, {})
    (line,) = [line for line in table_text(table).splitlines() if line.startswith("| small")]
    assert line.split() == ["|", "small", "|", "74.0", "|"]
    assert Page(page_html(config_of(), table_of(config_of(), FIGURES, {}), "")).all("path", **{"class": "whisker"})
    assert not Page(page_html(one, table, "")).all("path", **{"class": "whisker"})


def test_a_key_that_is_not_there_says_what_is():
    result = {"metrics": {"vtc": {"r1": 3}, "name": "x"}}

    def measure(key):
        return Measure(name="m", stage="validation", key=key)

    assert figure(result, measure("metrics.vtc.r1")) == 3.0
    with pytest.raises(ConfigError, match="at 'vtm' there are vtc, name"):
        figure(result, measure("metrics.vtm.r1"))
    with pytest.raises(ConfigError, match="a value stands before it"):
        figure(result, measure("metrics.vtc.r1.x"))
    with pytest.raises(ConfigError, match="'x', no number"):
        figure(result, measure("metrics.name"))


@pytest.mark.parametrize("text", [text for text in NASTY if len(text) <= 120], ids=range(7))
def test_names_never_become_markup(text):
    rows = [{"name": "small"}, {"name": text}]
    config = config_of(rows=rows, title=text, note=text)
    table = table_of(config, {"small": FIGURES["small"], text: FIGURES["large"]}, {("small", 0, "train"): "diverged"})
    page = Page(page_html(config, table, text))
    assert not page.all("script")
    assert not page.all("img")
    assert any(text in part for part in page.text)
    assert "default-src 'none'" in str(page.all("meta"))


def test_the_plot_spans_seeds_and_bars():
    html = page_html(config_of(), table_of(config_of(), FIGURES, {}), "")
    page = Page(html)
    (plot,) = page.all("svg")
    assert plot["aria-label"] == "R@1: small: 72.0 ± 2.0; large: 77.7 ± 3.8"
    assert len(page.all("circle")) == 2
    centres = [float(circle["cx"] or 0) for circle in page.all("circle")]
    assert centres[0] < centres[1]
    assert all(156 <= centre <= 460 for centre in centres)
