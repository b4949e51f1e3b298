"""Which sentence follows from the parts of a step."""

import argparse
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import end_to_end
from benchmarks.harness import Row
from benchmarks.step_parts import PARTS, advice, avoidable, bars

FAST = {
    "forward": 30.0,
    "backward": 60.0,
    "update": 6.0,
    "data wait": 1.0,
    "prompter wait": 1.0,
    "rest": 2.0,
    "beside: read": 10.0,
    "beside: decode": 20.0,
    "beside: text": 5.0,
}
LIMITS = {"forward": 28.0, "backward": 59.0, "update": 5.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["nothing stands out", "1.0 times"]),
        ({"data wait": 100.0, "beside: decode": 190.0}, ["decoding (", "stream.decode.num_workers", "50 %"]),
        ({"data wait": 100.0, "beside: read": 190.0}, ["reading (", "faster disk"]),
        ({"prompter wait": 100.0}, ["the prompter (", "prompter.lookahead"]),
        ({"forward": 90.0}, ["forward and backward take 94 %", "1.7 times", "stream.global_batch", "precision=bf16"]),
        ({"backward": 120.0}, ["forward and backward take", "compile=true"]),
        ({"update": 50.0}, ["the optimizer's update takes 35 %", "zero_stage=1"]),
        ({"rest": 50.0}, ["34 % of the step is outside of its parts", "train.log_every"]),
    ],
)
def test_each_cause_has_its_own_sentence(changes, words):
    text = advice(FAST | changes, LIMITS)
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_what_is_slow_without_a_limit_is_not_called_avoidable():
    costs = avoidable(FAST | {"forward": 900.0, "update": 900.0}, {"backward": 50.0})
    assert costs == {"data wait": 1.0, "prompter wait": 1.0, "model": 10.0, "update": 0.0, "rest": 2.0}
    assert avoidable(FAST, {"forward": 99.0})["model"] == 0.0, "faster than its limit is no cost"
    assert "times" not in advice(FAST, {})


def test_a_measured_rest_below_zero_is_drawn_as_nothing():
    drawn = bars(FAST | {"rest": -0.3}, LIMITS)
    assert [bar.name for bar in drawn] == list(PARTS)
    assert [bar.value for bar in drawn][-1] == 0.0
    assert [bar.limit for bar in drawn] == [28.0, 59.0, 5.0, None, None, None]


def test_the_benchmark_ends_with_chart_and_sentence(tmp_path, capsys):
    values = FAST | {"step": 100.0, "backward": 200.0}
    rows = [Row(name=name, value=value, unit="ms", limit=LIMITS.get(name)) for name, value in values.items()]
    chart = tmp_path / "new" / "step.svg"
    end_to_end.conclude(argparse.Namespace(chart=chart), rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == [name.split()[0] for name in PARTS]
    assert "░" in lines[3]
    assert lines[-1] == advice(values, LIMITS)
    assert ElementTree.parse(chart).getroot().tag.endswith("svg")
