"""A run that was interrupted and goes on equals one that was not, bit for bit, dropout included."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from dying_runs import assert_same_run, config, die_at_step, metrics_of, train_until_death

from alpro_stream.config import save_config
from alpro_stream.errors import CheckpointError
from alpro_stream.run import train
from alpro_stream.shards import load_dataset_info
from alpro_stream.testing.configs import write_corpus
from alpro_stream.testing.shards import write_dataset
from alpro_stream.train.checkpoint import complete_checkpoints

STEPS = {"train.max_steps": 8, "train.checkpoint_every": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prompter(corpus, tmp_path_factory):
    """Stage one, trained for a moment at a low temperature, so that soft labels differ."""
    run = config(corpus, tmp_path_factory.mktemp("prompter"), **{"train.max_steps": 1, "model.temperature": 0.001})
    return train(run).checkpoint


@pytest.fixture(scope="module")
def pretrain(prompter):
    """All four losses; dropout and stochastic depth are on, as they are by default."""
    return {
        "task": "pretrain",
        "prompter.checkpoint": str(prompter),
        "prompter.placement": "inline",
        "losses.pem.threshold": 0.1,
        **STEPS,
    }


@pytest.fixture(scope="module")
def undisturbed(corpus, pretrain, tmp_path_factory):
    run = config(corpus, tmp_path_factory.mktemp("undisturbed"), **pretrain)
    train(run)
    return run.run_dir


def test_the_undisturbed_run_is_worth_comparing(undisturbed, corpus, pretrain, tmp_path):
    lines = metrics_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"loss/vtc", "loss/vtm", "loss/mlm", "loss/pem"} <= lines[0].keys()
    assert {line["source"] for line in lines} == {"video", "image"}
    calm = config(corpus, tmp_path, **pretrain, **{"model.text.dropout": 0, "model.video.drop_path": 0})
    train(calm)
    assert metrics_of(tmp_path)[0]["loss/vtc"] != lines[0]["loss/vtc"]


def test_killed_twice_mid_way_and_straight_after_a_checkpoint(corpus, pretrain, undisturbed, tmp_path):
    run = config(corpus, tmp_path, **pretrain)
    assert train_until_death(run, die_at_step, 5) == -signal.SIGKILL
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    # The first step after the checkpoint of step 3; then the first after that of step 6.
    assert train_until_death(run, die_at_step, 4) == -signal.SIGKILL
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4]
    assert train_until_death(run, die_at_step, 7) == -signal.SIGKILL
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000003", "step-000006"]
    assert not train(run).already_done
    assert_same_run(tmp_path, undisturbed)


def test_micro_batches_resume_as_exactly(corpus, pretrain, tmp_path):
    parts = {**pretrain, "train.engine.num_micro_batches": 2}
    whole, killed = config(corpus, tmp_path / "whole", **parts), config(corpus, tmp_path / "killed", **parts)
    train(whole)
    assert train_until_death(killed, die_at_step, 4) == -signal.SIGKILL
    train(killed)
    assert_same_run(killed.run_dir, whole.run_dir)


def test_a_command_killed_from_outside_goes_on(corpus, tmp_path):
    steps = {"train.max_steps": 40, "train.checkpoint_every": 4, "train.engine.zero_stage": 1}
    whole, killed = config(corpus, tmp_path / "whole", **steps), config(corpus, tmp_path / "killed", **steps)
    train(whole)
    save_config(killed, tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "alpro_launch.train", str(tmp_path / "killed.yaml")]
    metrics = killed.run_dir / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 10):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 10 <= len(metrics_of(killed.run_dir)) < 40
    assert not train(killed).already_done
    assert_same_run(killed.run_dir, whole.run_dir)


def test_a_finished_run_is_left_as_it_is(corpus, pretrain, undisturbed):
    before = sorted((path, path.stat().st_mtime_ns) for path in undisturbed.rglob("*") if path.is_file())
    finished = train(config(corpus, undisturbed, **pretrain))
    assert finished.already_done
    assert finished.checkpoint == complete_checkpoints(undisturbed)[-1]
    after = sorted((path, path.stat().st_mtime_ns) for path in undisturbed.rglob("*") if path.is_file())
    assert [entry for entry in after if entry[0].name != ".lock"] == [e for e in before if e[0].name != ".lock"]


def test_a_longer_run_goes_on_and_says_that_its_schedule_changed(corpus, tmp_path, caplog):
    train(config(corpus, tmp_path, **{"train.max_steps": 2}))
    with caplog.at_level(logging.WARNING, logger="alpro_stream"):
        train(config(corpus, tmp_path, **{"train.max_steps": 3}))
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3]
    assert "the run had 2 steps and has 3 now" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream.seed": 7}, "seed: 42 != 7"),
        ({"stream.num_lanes": 2}, "num_lanes: 4 != 2"),
        ({"model.text.dropout": 0.25}, r"model\.text\.dropout: 0\.1 != 0\.25"),
        ({"task": "prompter"}, "task: 'pretrain' != 'prompter'"),
        ({"train.engine.zero_stage": 2}, "1 ranks with ZeRO stage 1, this run has 1 with stage 2"),
    ],
)
def test_another_run_in_its_directory_is_refused_with_both_values(corpus, pretrain, undisturbed, changes, message):
    with pytest.raises(CheckpointError, match=message):
        train(config(corpus, undisturbed, **{**pretrain, **changes}))


def test_other_data_is_refused_with_both_digests(corpus, pretrain, undisturbed, tmp_path):
    other = write_corpus(tmp_path / "other")
    write_dataset(other / "train", video_shards=(24,), image_shards=(9,), size=64)
    digests = [load_dataset_info(directory / "train").digest for directory in (corpus, other)]
    with pytest.raises(CheckpointError, match=rf"'{digests[0]}' != '{digests[1]}'"):
        train(config(other, undisturbed, **pretrain))


def test_another_prompter_is_refused(corpus, pretrain, undisturbed, tmp_path):
    other = train(config(corpus, tmp_path, **{"train.max_steps": 2})).checkpoint
    with pytest.raises(CheckpointError, match=r"prompter: '[0-9a-f]{64}' != '[0-9a-f]{64}'"):
        train(config(corpus, undisturbed, **{**pretrain, "prompter.checkpoint": str(other)}))
