"""The metrics file across runs that were killed and went on."""

import importlib.util
import json
import sys
from contextlib import ExitStack, closing
from types import SimpleNamespace

import pytest
import yaml

from alpro_stream.errors import ConfigError
from alpro_stream.train import metrics as metrics_module
from alpro_stream.train.metrics import MetricsWriter, ProgressLine, WandbConfig, read_metrics


def write(run_dir, first_step, steps, value):
    writer = MetricsWriter(run_dir, first_step)
    for step in steps:
        writer.write(step, {"loss/vtc": value, "source": "video"})
    writer.close()


def steps_of(run_dir):
    return [(line["step"], line["loss/vtc"]) for line in read_metrics(run_dir)]


def test_lines_of_steps_that_were_not_committed_are_dropped(tmp_path):
    write(tmp_path, 0, range(1, 6), 1.0)
    write(tmp_path, 3, range(4, 7), 2.0)
    assert steps_of(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, range(1, 4), 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_of(tmp_path) == [(1, 1.0), (2, 1.0)]
    write(tmp_path, 2, [3], 2.0)
    assert steps_of(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_each_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss/vtc": 0.5})
    assert steps_of(tmp_path) == [(1, 0.5)]
    writer.close()


def test_lines_of_earlier_runs_survive_a_death_while_they_are_taken_over(tmp_path, monkeypatch):
    write(tmp_path, 0, range(1, 4), 1.0)

    class Died(Exception):
        pass

    def die(*_):
        raise Died

    monkeypatch.setattr(metrics_module.json, "dumps", die)
    with pytest.raises(Died):
        MetricsWriter(tmp_path, 3)
    monkeypatch.undo()
    assert steps_of(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_no_file_is_no_line(tmp_path):
    assert read_metrics(tmp_path) == []


def test_progress_without_a_terminal_prints_the_first_and_the_last_step(capsys):
    progress = ProgressLine("pretrain", 3, 0, shown=True)
    timing = {"clips_per_s": 12.34, "data_wait_percent": 5.0, "prompter_wait_percent": 0.0}
    for step in (1, 2, 3):
        progress.show(step, {"loss/vtc": 2.0, "loss/mlm": 1.5, "gradient_norm": 9.0}, timing)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert "vtc 2.000 mlm 1.500 | 12.3 clips/s" in lines[0]
    assert "9.0" not in lines[0]


def test_other_ranks_show_nothing(capsys):
    progress = ProgressLine("pretrain", 3, 0, shown=False)
    progress.show(3, {}, {"clips_per_s": 1.0, "data_wait_percent": 0.0, "prompter_wait_percent": 0.0})
    progress.close()
    assert capsys.readouterr().err == ""


def test_figures_that_are_missing_are_left_out_of_the_progress(capsys):
    progress = ProgressLine("pretrain", 2, 0, shown=True)
    progress.show(1, {"loss/vtc": float("nan"), "validation/vtc": 3.0}, {})
    progress.show(2, {}, {"data_wait_percent": 1.0})
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["pretrain 1/2 vtc nan", "pretrain 2/2 wait: data 1.0 %"]


def test_brackets_in_what_is_said_are_text(capsys):
    progress = ProgressLine("[/red]", 1, 0, shown=True)
    progress.say("look in [/data]/run, or set stream.skip_steps=[[1,3]]")
    progress.show(1, {}, {})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["look in [/data]/run, or set stream.skip_steps=[[1,3]]", "[/red] 1/1 "]


class WandbStandIn:
    """In place of Weights & Biases, which is not installed here: what is handed to it, and in which order."""

    class Error(Exception):
        pass

    def __init__(self):
        self.starts, self.logged, self.ended, self.refusal = [], [], [], None

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.starts.append(arguments)
        return SimpleNamespace(
            log=self.logged.append,
            finish=lambda exit_code: self.ended.append(exit_code),
            define_metric=lambda name, step_metric: self.logged.append((name, step_metric)),
        )


@pytest.fixture
def wandb(monkeypatch):
    stand_in = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_weights_and_biases_gets_the_numbers_the_config_and_the_end(wandb, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "pretrain"}))
    config = WandbConfig(project="clips", name="first", entity="us", mode="offline")
    writer = MetricsWriter(tmp_path, 0, config)
    writer.write(1, {"loss/vtc": 0.5, "source": "video"})
    writer.close()
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["entity"], start["mode"]) == ("clips", "first", "us", "offline")
    assert (start["config"], start["dir"], start["resume"]) == ({"task": "pretrain"}, str(tmp_path), "allow")
    # Its own step would drop what comes again after a return to an earlier checkpoint.
    assert wandb.logged == [("*", "step"), {"step": 1, "loss/vtc": 0.5}]
    assert wandb.ended == [0]
    assert steps_of(tmp_path) == [(1, 0.5)]


def test_a_run_that_goes_on_is_the_same_there_and_one_that_begins_anew_is_not(wandb, tmp_path):
    for first_step in (0, 3, 7, 0):
        MetricsWriter(tmp_path, first_step, WandbConfig(project="clips")).close()
    ids = [start["id"] for start in wandb.starts]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert all(ids)


def test_weights_and_biases_is_told_of_a_failure(wandb, tmp_path):
    def train():
        with ExitStack() as stack:
            stack.enter_context(closing(MetricsWriter(tmp_path, 0, WandbConfig(project="clips"))))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert wandb.ended == [1]


def test_weights_and_biases_that_does_not_start_leaves_the_metrics_as_they_were(wandb, tmp_path):
    write(tmp_path, 0, range(1, 4), 1.0)
    wandb.refusal = "api_key not configured"
    with pytest.raises(ConfigError, match=r"api_key not configured. Log in with `wandb login`, or set train"):
        MetricsWriter(tmp_path, 2, WandbConfig(project="clips"))
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is installed")
def test_weights_and_biases_that_is_not_installed_is_one_clear_message(tmp_path):
    with pytest.raises(ConfigError, match=r"`pip install wandb` in this environment, or remove train.wandb"):
        MetricsWriter(tmp_path, 0, WandbConfig(project="clips"))
    assert list(tmp_path.iterdir()) == []
