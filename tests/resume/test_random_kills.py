"""Killed at any moment, a run goes on as if nothing had happened: while it starts, steps, saves, or is restored.

With dropout, stochastic depth, all four losses and the prompter in a process of its own.
"""

import random
import signal
import time

import pytest
from dying_runs import assert_same_run, config, metrics_of, training

from alpro_stream.run import train
from alpro_stream.testing.configs import write_corpus

NUM_STEPS = 48
# Threads start sooner than processes, and the stream has its own tests of kills.
CHANGES = {"train.max_steps": NUM_STEPS, "train.checkpoint_every": 2, "stream.decode.workers": "threads"}
# A start that is not killed goes on to the first step; a step with its save takes less than this.
START_S, STEP_S = 6.0, 0.2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def pretrain(corpus, tmp_path_factory):
    # Trained at a low temperature, so that some soft labels are confident and some are not.
    one = config(corpus, tmp_path_factory.mktemp("prompter"), **{"train.max_steps": 1, "model.temperature": 0.001})
    return {
        "task": "pretrain",
        "prompter.checkpoint": str(train(one).checkpoint),
        "losses.pem.threshold": 0.1,
        **CHANGES,
    }


@pytest.fixture(scope="module")
def undisturbed(corpus, pretrain, tmp_path_factory):
    """A run that nobody killed; the labels of a prompter inline are the same, and there sooner."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train(config(corpus, run_dir, **pretrain, **{"prompter.placement": "inline"}))
    return run_dir


def nothing():
    """It dies from outside."""


def num_lines(run):
    metrics = run.run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_killed_at_random_moments(corpus, pretrain, undisturbed, tmp_path, num_kills):
    seed = random.randrange(10_000)
    print(f"seed {seed}")  # pytest shows it when the test fails
    draw = random.Random(seed)
    run, reached = config(corpus, tmp_path / "run", **pretrain), 0
    for kill in range(num_kills):
        with training(run, nothing) as process:
            if draw.random() < 0.25:
                moment, at = draw.uniform(0, START_S), "of the start"
            else:
                # So many further steps that it is not done before its last kill.
                step = min(reached + draw.randint(1, max(1, 2 * NUM_STEPS // num_kills - 2)), NUM_STEPS - 4)
                moment, at = draw.uniform(0, STEP_S), f"behind step {step}"
                while process.is_alive() and num_lines(run) < step:
                    time.sleep(0.002)
            process.join(moment)
        print(f"kill {kill + 1}: {moment:.3f} s {at}, {num_lines(run)} lines")
        assert process.exitcode in (-signal.SIGKILL, 0)
        reached = num_lines(run)
    train(run)
    assert_same_run(run.run_dir, undisturbed)
    lines = metrics_of(run.run_dir)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all({"loss/vtc", "loss/vtm", "loss/mlm", "loss/pem"} <= line.keys() for line in lines)
