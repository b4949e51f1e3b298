"""SIGTERM: the step is finished and saved, the status says so, and the run goes on as if nothing had been."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from dying_runs import assert_same_run, config

from alpro_launch.local_ranks import free_port
from alpro_stream.config import save_config
from alpro_stream.exit_status import HARDWARE, INTERRUPTED, PREEMPTED
from alpro_stream.run import train
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.preemption import STOP_FILE

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
        start_new_session=True,  # A process group of its own, as a terminal and a scheduler make.
    )


def wait_for_steps(run, process, steps=2):
    deadline = time.monotonic() + 120
    while len(read_metrics(run.run_dir)) < steps:
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
    assert process.returncode == PREEMPTED == 75
    (saved,) = complete_checkpoints(run.run_dir)
    assert f"asked to stop, saved: {saved}" in said
    step = int(saved.name.removeprefix("step-"))
    assert 2 <= step < 400
    shorter = {**calm, "train.max_steps": step + 3}
    # The learning rate follows the number of steps, so the run it is held against has the same ones.
    whole, halves = tmp_path / "whole", config(corpus, tmp_path / "halves", **shorter)
    stopping = iter([False, False, False, True])  # when the ranks have met, and after each step
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
    assert process.returncode == PREEMPTED
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
    assert process.returncode == PREEMPTED
    assert len(complete_checkpoints(run.run_dir)) == 1


def test_a_request_to_all_processes_of_a_run_at_once_is_one_to_save(corpus, tmp_path):
    """Slurm and deepspeed send SIGTERM to prompter and decoding processes too, perhaps before the trainer."""
    stage_one = config(corpus, tmp_path / "prompter", **{"train.max_steps": 1})
    changes = {"task": "pretrain", "prompter.checkpoint": str(train(stage_one).checkpoint), **STEPS}
    run = config(corpus, tmp_path / "run", **changes, **{"stream.decode.workers": "processes"})
    process = start(run, tmp_path, "alpro_launch.train")
    wait_for_steps(run, process)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert len(helpers) >= 2
    for one in helpers:
        one.terminate()
    wait_for_steps(run, process, len(read_metrics(run.run_dir)) + 8)
    assert [one for one in helpers if not one.is_running() or one.status() == psutil.STATUS_ZOMBIE] == []
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert len(complete_checkpoints(run.run_dir)) == 1
    _, alive = psutil.wait_procs(helpers, timeout=20)
    assert alive == []


def test_a_file_asks_too_and_is_gone_when_that_is_done(corpus, tmp_path):
    run = config(corpus, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.train")
    wait_for_steps(run, process)
    (run.run_dir / STOP_FILE).touch()
    process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert not (run.run_dir / STOP_FILE).exists()
    assert len(complete_checkpoints(run.run_dir)) == 1


@pytest.mark.slow
def test_the_whole_group_may_be_asked_and_asked_again(corpus, tmp_path):
    """Each rank then has one request of the scheduler and one of the launcher, which has two itself."""
    run = config(corpus, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--ranks", "2")
    wait_for_steps(run, process)
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.5)  # The launcher has handed it on, and waits for ranks that save.
    if process.poll() is None:
        process.terminate()
    _, said = process.communicate(timeout=90)
    assert process.returncode == PREEMPTED, said
    assert len(complete_checkpoints(run.run_dir)) == 1
    assert "Traceback" not in said
    assert said.count("asked to stop") == 1


@pytest.mark.slow
def test_an_interrupted_run_says_so_once(corpus, tmp_path):
    run = config(corpus, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--ranks", "2")
    wait_for_steps(run, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, said
    assert said.count("interrupted") == 1
    assert "Traceback" not in said


def imports_torch(process):
    with suppress(psutil.Error, OSError):
        return any("libtorch" in file.path for file in process.memory_maps())
    return False


@pytest.mark.parametrize("through", ["launcher", "rank"])
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, PREEMPTED, "asked to stop before it began"), (signal.SIGINT, INTERRUPTED, "interrupted")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_run_that_is_asked_to_end_while_it_imports_says_that_in_a_line(tmp_path, through, number, status, words):
    run = config(tmp_path, tmp_path / "run", **STEPS)
    command = ["alpro_launch.cli", "train"] if through == "launcher" else ["alpro_launch.train"]
    process = start(run, tmp_path, *command)
    started, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while not any(map(imports_torch, [started, *started.children()])):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    (line,) = said.splitlines()
    assert line.startswith(words)
    assert not run.run_dir.exists()


def test_a_run_that_waits_for_another_machine_ends_at_once_when_it_is_asked(tmp_path):
    run = config(tmp_path, tmp_path / "run", **{**STEPS, "train.timeout_s": 300})
    port = free_port()
    place = ["--nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    process = start(run, tmp_path, "alpro_launch.cli", "train", *place)
    deadline = time.monotonic() + 120
    while not is_open(port):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)  # It waits then, whether or not it does at once.
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert said.count("asked to stop before it began") == 1
    assert not run.run_dir.exists()


def test_a_launcher_that_is_asked_before_it_has_started_a_rank(tmp_path):
    """It imports torch itself where it is to start ranks again."""
    run = config(tmp_path, tmp_path / "run", **STEPS)
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--max-restarts", "1")
    deadline = time.monotonic() + 60
    while not imports_torch(psutil.Process(process.pid)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, said
    assert [line.startswith("asked to stop before it began") for line in said.splitlines()] == [True]


def test_nobody_asked_a_run_that_ends_because_a_rank_was_killed(tmp_path):
    """While the ranks wait for those of another machine; the launcher ends the others by SIGTERM."""
    run = config(tmp_path, tmp_path / "run", **{**STEPS, "train.timeout_s": 300})
    port = free_port()
    place = ["--nodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    process = start(run, tmp_path, "alpro_launch.cli", "train", "--ranks", "2", *place)
    deadline = time.monotonic() + 120
    while not is_open(port):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    last = max(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    last.kill()
    printed, said = process.communicate(timeout=60)
    assert process.returncode == HARDWARE, said
    assert "asked to stop" not in said
    assert said.splitlines()[-1] == (
        "error: rank 1 of this machine was ended by SIGKILL (out of memory, perhaps); the same command goes on "
        "from the last checkpoint"
    )
    assert "frame #" not in said
    # It is in no file yet.
    assert "configuration" not in printed


def is_open(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_request_from_before_the_start_is_of_this_run_and_of_no_later_one(corpus, tmp_path):
    """Nobody knows which of them was meant: it makes a step and saves it, or was done and has nothing to save."""
    run = config(corpus, tmp_path / "run", **{"train.max_steps": 2})
    stop = run.run_dir / STOP_FILE
    run.run_dir.mkdir()

    def ended():
        process = start(run, tmp_path, "alpro_launch.train")
        _, said = process.communicate(timeout=120)
        assert not stop.exists(), said
        return process.returncode, complete_checkpoints(run.run_dir)[-1].name

    stop.touch()
    assert ended() == (PREEMPTED, "step-000001")
    assert ended() == (0, "step-000002")
    stop.touch()
    assert ended() == (0, "step-000002")


ASKED_OFTEN = """
import os, signal, sys, time
from alpro_stream.train import preemption
preemption._ONE_REQUEST_S = float(sys.argv[1])
request = preemption.StopRequest()
assert not request.asked
os.kill(os.getpid(), signal.SIGTERM)
assert request.asked
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    os.kill(os.getpid(), signal.SIGTERM)
print("too late", flush=True)
"""


@pytest.mark.parametrize(
    ("same_s", "for_s", "status", "said"),
    [("1", "20", -signal.SIGTERM, "still here\n"), ("60", "0.5", 0, "still here\ntoo late\n")],
    ids=["later", "at once"],
)
def test_a_later_request_ends_a_process_and_a_repeated_one_does_not(same_s, for_s, status, said):
    command = [sys.executable, "-c", ASKED_OFTEN, same_s, for_s]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, said)
