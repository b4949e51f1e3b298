"""The metrics file across runs that were killed and went on."""

import json

import pytest

from alpro_stream.train import metrics as metrics_module
from alpro_stream.train.metrics import MetricsWriter, ProgressLine, read_metrics


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
