"""A rank that stands still: what its processes do is written down, and it ends by name."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from alpro_stream.config import save_config
from alpro_stream.exit_status import HARDWARE
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.train.stage import Stage
from alpro_stream.train.watchdog import watching

CHILD = """
import sys, time
from alpro_stream.stacks import take_part
take_part()
def a_telling_name():
    print("there", flush=True)
    time.sleep(60)
a_telling_name()
"""


def wait_until(what, condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_stacks_of_a_rank_and_of_what_it_started(tmp_path):
    said = []
    stage = Stage()
    stage.enter("step 7")
    with watching(stage, 1, tmp_path, 3, said.append):
        telling = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        # One that a signal without a handler would end.
        other = subprocess.Popen(["sleep", "60"])
        telling.stdout.readline()
        stage.enter("step 8")
        try:
            wait_until("nothing was said", lambda: said)
            assert telling.poll() is other.poll() is None
        finally:
            for process in (telling, other):
                process.kill()
                process.wait()
            telling.stdout.close()
    (message,) = said
    assert message.startswith("rank 3 on ")
    assert re.search(r" has been at step 8 for [2-4] s, and does not come out of it \(train.timeout_s=1\)", message)
    assert message.endswith(f"what its processes do is in {tmp_path / 'stacks-rank3.txt'}")
    written = (tmp_path / "stacks-rank3.txt").read_text()
    assert "test_stacks_of_a_rank_and_of_what_it_started" in written
    assert written.count("in a_telling_name") == 1
    assert f"process {other.pid}: sleep 60 (does not tell its stacks)" in written
    # Before the collectives give up: their stacks would be gone.
    assert written.count("====") == 1


def test_nothing_is_said_while_there_is_progress(tmp_path):
    said = []
    stage = Stage()
    with watching(stage, 1, tmp_path / "logs", 0, said.append):
        assert os.environ["ALPRO_STACKS"] == str(tmp_path / "logs/stacks-rank0.txt")
        for step in range(20):
            stage.enter(f"step {step}")
            time.sleep(0.1)
    assert said == []
    assert "ALPRO_STACKS" not in os.environ
    assert not list((tmp_path / "logs").iterdir())


def test_a_call_that_holds_the_interpreter_is_ended_too(tmp_path):
    script = """
        import ctypes, sys
        from pathlib import Path
        from alpro_stream.train.stage import Stage
        from alpro_stream.train.watchdog import watching
        def hang():
            ctypes.PyDLL(None).sleep(60)
        with watching(Stage(), 2, Path(sys.argv[1]), 0, print):
            import time; time.sleep(1.5)  # its thread has looked once
            hang()
    """
    started = time.monotonic()
    status = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], timeout=50, check=False
    ).returncode
    assert status == 1
    assert time.monotonic() - started < 25
    assert "in hang" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.timeout(180)
def test_a_read_that_never_returns_ends_the_run_on_every_rank(corpus, tmp_path):
    """As from a file server that is gone: both ranks end, with what was waited for and where."""
    changes = {"train.timeout_s": 8, "train.max_steps": 5000, "train.rehearsal": False}
    config, own = tmp_path / "run.yaml", tmp_path / "corpus"
    shutil.copytree(corpus, own)
    save_config(RunConfig.model_validate(tiny_run(own, tmp_path / "run", changes)), config)
    # Opening a pipe that nobody writes to blocks; the description and the index are read, then the tar.
    for tar in (own / "train").glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)
    command = [sys.executable, "-m", "alpro_launch.cli", "train", str(config), "--ranks", "2"]
    with (tmp_path / "printed.txt").open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            status = launcher.wait(120)
        finally:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
                process.kill()
            launcher.kill()
    printed = (tmp_path / "printed.txt").read_text()
    assert status == HARDWARE, printed
    for rank in (0, 1):
        assert (
            f"rank {rank}: error: rank {rank} on {socket.gethostname()} has been at the data of step 1 for " in printed
        )
        stacks = tmp_path / f"run/logs/stacks-rank{rank}.txt"
        assert f"what its processes do is in {stacks}" in printed
        assert "in open_tar" in stacks.read_text()


def test_a_validation_is_as_many_stages_as_it_has_batches(corpus, tmp_path, monkeypatch):
    """One that takes longer than the limit, with batches that do not, is no rank that stands still."""
    entered = []

    def enter(stage, name):
        entered.append(name)
        stage.now = (name, time.monotonic())

    monkeypatch.setattr(Stage, "enter", enter)
    held_out = {"sources": [{"path": str(corpus / "train"), "kind": "video"}], "every": 2, "num_batches": 3}
    held_out |= {"num_clips": 4, "batch_size": 2}
    changes = {"train.max_steps": 2, "train.checkpoint_every": 2, "validation": held_out}
    train(RunConfig.model_validate(tiny_run(corpus, tmp_path / "run", changes)))
    begin = entered.index("the validation after step 2")
    batches = [f"batch {number} of the validation" for number in (1, 2, 3)]
    assert entered[begin + 1 : begin + 5] == [*batches, "the retrieval of the validation"]


@pytest.mark.timeout(120)
def test_a_validation_that_stands_still_ends_the_rank_by_name(corpus, tmp_path):
    """Its data are behind pipes that nobody writes to; those of the training are there."""
    shutil.copytree(corpus / "train", tmp_path / "held-out")
    held_out = {"sources": [{"path": str(tmp_path / "held-out"), "kind": "video"}], "num_batches": 1, "num_clips": 0}
    changes = {"train.timeout_s": 10, "train.max_steps": 2, "validation": held_out}
    config = tmp_path / "run.yaml"
    save_config(RunConfig.model_validate(tiny_run(corpus, tmp_path / "run", changes)), config)
    for tar in (tmp_path / "held-out").glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)
    command = [sys.executable, "-m", "alpro_launch.train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == HARDWARE, done.stderr
    assert "has been at batch 1 of the validation for " in done.stderr
    assert "in open_tar" in (tmp_path / "run/logs/stacks-rank0.txt").read_text()
