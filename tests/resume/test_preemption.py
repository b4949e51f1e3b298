"""SIGTERM: the step is finished and saved, the status says so, and the run goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from dying_runs import assert_same_run, config

from alpro_stream.config import save_config
from alpro_stream.run import train
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.preemption import EXIT_PREEMPTED

STEPS = {"train.max_steps": 400, "train.checkpoint_every": 1000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def start(run, tmp_path, *command):
    save_config(run, tmp_path / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", *command, str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_steps(run, process):
    deadline = time.monotonic() + 120
    while len(read_metrics(run.run_dir)) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def calm():
    return {**STEPS, "model.text.dropout": 0.1}


def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_by_bit(corpus, calm, tmp_path):
    run = config(corpus, tmp_path / "run", **calm)
    process = start(run, tmp_path, "alpro_launch.train")
    wait_for_steps(run, process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED == 75
    (saved,) = complete_checkpoints(run.run_dir)
    assert f"asked to stop, saved: {saved}" in said
    step = int(saved.name.removeprefix("step-"))
    assert 2 <= step < 400
    shorter = {**calm, "train.max_steps": step + 3}
    # The learning rate follows the number of steps, so the run it is held against has the same ones.
    whole, halves = tmp_path / "whole", config(corpus, tmp_path / "halves", **shorter)
    stopping = iter([False, False, True])
    assert train(halves, lambda: next(stopping, False)).was_stopped
    assert [path.name for path in complete_checkpoints(halves.run_dir)] == ["step-000003"]
    assert not train(halves).was_stopped
    train(config(corpus, whole, **shorter))
    assert_same_run(halves.run_dir, whole)


def test_all_ranks_of_a_launcher_save_together_and_nothing_is_left(corpus, tmp_path):
    run = config(corpus, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--ranks", "2")
    wait_for_steps(run, process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.terminate()
    process.communicate(timeout=90)
    assert process.returncode == EXIT_PREEMPTED
    assert len(complete_checkpoints(run.run_dir)) == 1
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert alive == []


def test_one_rank_that_is_asked_is_enough(corpus, tmp_path):
    run = config(corpus, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--ranks", "2")
    wait_for_steps(run, process)
    ranks = [one for one in psutil.Process(process.pid).children() if "alpro_launch.train" in one.cmdline()]
    ranks[1].send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == EXIT_PREEMPTED
    assert len(complete_checkpoints(run.run_dir)) == 1


ASKED_TWICE = """
import os, signal
from alpro_stream.train.preemption import StopRequest
request = StopRequest()
assert not request.asked
os.kill(os.getpid(), signal.SIGTERM)
assert request.asked
print("still here", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("too late", flush=True)
"""


def test_a_second_request_ends_a_process_at_once():
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still here\n")
