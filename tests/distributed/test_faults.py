"""What ends a rank, the launcher or the prompter ends the run: soon, by name, and with nothing left behind."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alpro_launch.local_ranks import free_port
from alpro_stream.config import save_config
from alpro_stream.errors import AlproError
from alpro_stream.exit_status import HARDWARE
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.checkpoint import latest_checkpoint
from alpro_stream.train.distributed import join_world
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.roll_call import Answer, RollCall, State, ask, describe
from alpro_stream.train.stage import Stage

MARK = "ALPRO_TEST_STARTED_BY"
STEPS = {
    "train.max_steps": 24,
    "train.checkpoint_every": 3,
    "train.engine.num_threads": 1,
    # Threads start sooner than processes, and the stream has its own tests of kills.
    "stream.decode.workers": "threads",
}
GOES_ON = "the same command goes on from the last checkpoint"


def test_the_missing_are_named_and_not_those_that_wait():
    waits = dict.fromkeys(range(4), Answer(State.WAITING))
    silent, busy, gone = Answer(State.SILENT), Answer(State.BUSY, "step 7, for 12 s"), Answer(State.GONE)
    assert describe(waits) == ""
    assert describe(waits | {2: silent}).startswith("rank 2 does not answer")
    said = describe(waits | {2: busy}, {2: "node1"})
    assert said.startswith("rank 2 on node1 is at work and not there yet; raise train.timeout_s")
    assert said.endswith("(at step 7, for 12 s)")
    # Those at work have not noticed yet.
    found = describe(waits | {3: gone, 0: silent, 1: busy})
    assert re.fullmatch(r"rank 0 does not answer[^;]*; rank 3 has ended[^;]*", found)


def test_a_rank_answers_while_it_works_and_while_it_waits():
    stage = Stage()
    one = RollCall(stage)
    assert ask(one.address, 1) == (State.BUSY, "the start, for 0 s")
    stage.enter("x" * 1000)
    one.waiting = True
    assert ask(one.address, 1).state == State.WAITING
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        assert ask(address, 1).state == State.SILENT
    assert ask(address, 1).state == State.GONE


def wait_with_others(pipe, rank, size, port, victim, fault):
    """Sums with the others until one of them is no more, or stands still; what is said then, and after how long."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    world = join_world(timeout_s=3)
    world.sum(torch.ones(1))
    if rank == victim:
        if fault == "busy":
            world.stage.enter("the data of step 3")
            time.sleep(60)
        else:
            os.kill(os.getpid(), getattr(signal, fault))
    started = time.monotonic()
    try:
        world.sum(torch.ones(1))
    except AlproError as error:
        pipe.send((str(error), time.monotonic() - started))


@pytest.mark.parametrize(
    ("victim", "fault", "said"),
    [
        (1, "SIGKILL", "rank 1 has ended: it was killed (out of memory, perhaps), or its own message says why"),
        (0, "SIGKILL", "rank 0 has ended: it was killed"),
        (1, "SIGSTOP", "rank 1 does not answer: it is stopped, or its machine hangs"),
        (0, "SIGSTOP", "rank 0 does not answer: it is stopped"),
        (2, "busy", "rank 2 is at work and not there yet; raise train.timeout_s if it is only slow"),
    ],
)
def test_every_other_rank_names_the_one_that_is_missing(victim, fault, said):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alpro_stream.run"])
    port, processes, pipes = free_port(), [], []
    try:
        for rank in range(3):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, rank, 3, port, victim, fault)
            processes.append(context.Process(target=wait_with_others, args=arguments))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        for rank in {0, 1, 2} - {victim}:
            assert pipes[rank].poll(60), "a rank hangs"
            message, seconds = pipes[rank].recv()
            assert message.startswith(f"rank {rank} of 3 waited ")
            assert f"s for the sums of all ranks at the start, in vain: {said}" in message
            assert message.count("rank ") == 2
            assert ("(at the data of step 3, for " in message) == (fault == "busy")
            # The time-out, a moment for the others to give up, and one for the answer.
            assert seconds < (2 if fault == "SIGKILL" else 3) + 15
    finally:
        for process in processes:
            process.kill()
            process.join()


def processes_of(mark, rank=None):
    """Processes of a command, or of one of its ranks, with those that they started, however they were started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # It ended meanwhile.
            environment = process.environ()
            is_wanted = environment.get(MARK) == str(mark) and rank in (None, int(environment.get("RANK", -1)))
            if is_wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def rank_process(mark, rank):
    """The process of a rank, not its prompter or workers, which have its environment too; None before it is there."""
    for process in processes_of(mark, rank):
        with suppress(psutil.Error):
            if "alpro_launch.train" in process.cmdline():
                return process
    return None


def prompter_process(mark, rank):
    """The prompter beside a rank; None before it is there."""
    with suppress(psutil.Error):
        trainer = rank_process(mark, rank)
        for child in trainer.children() if trainer else []:
            if "spawn_main" in " ".join(child.cmdline()):
                return child
    return None


def wait_until(what, condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


class Sitting:
    """A started `alpro train`, on two ranks."""

    def __init__(self, config, mark, ranks):
        self.run_dir, self.mark = config.with_suffix(""), mark
        self.printed = mark.with_suffix(".txt")
        command = [sys.executable, "-m", "alpro_launch.cli", "train", str(config), "--ranks", str(ranks)]
        environment = {**os.environ, MARK: str(mark), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with self.printed.open("w") as file:
            self.launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def wait_for_step(self, step):
        def reached():
            assert self.launcher.poll() is None, self.printed.read_text()
            return any(line["step"] >= step for line in read_metrics(self.run_dir))

        wait_until(f"step {step}", reached, 150)

    def end(self, seconds):
        """Exit status, and what was printed; nothing may be left."""
        pids = [one.pid for one in processes_of(self.mark)]
        status = self.launcher.wait(seconds)
        printed = self.printed.read_text()
        assert "Traceback" not in printed
        wait_until("processes are left", lambda: not processes_of(self.mark), 10)
        names = [path.name for path in Path("/dev/shm").iterdir()]
        assert not [name for name in names if any(f"_{pid}_" in name for pid in pids)]
        return status, printed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def start(corpus, tmp_path):
    """Starts a run on two ranks, again and again in the same directory; kills what is left at the end."""
    marks = []

    def start(**changes):
        path = tmp_path / "run.yaml"
        save_config(RunConfig.model_validate(tiny_run(corpus, tmp_path / "run", {**STEPS, **changes})), path)
        marks.append(tmp_path / f"sitting-{len(marks)}")
        return Sitting(path, marks[-1], 2)

    yield start
    for mark in marks:
        for process in processes_of(mark):
            process.kill()


def learned(run_dir):
    losses = [(line["step"], line["loss/vtc"], line["gradient_norm"]) for line in read_metrics(run_dir)]
    return losses, load_file(latest_checkpoint(run_dir) / WEIGHTS_FILE)


def train_undisturbed(corpus, run_dir):
    train(RunConfig.model_validate(tiny_run(corpus, run_dir, STEPS)))


@pytest.mark.timeout(600)
def test_a_rank_killed_then_the_launcher_killed_and_each_time_started_again_at_once(start, corpus, tmp_path):
    """And what comes out at last is what two undisturbed ranks learn, dropout included."""
    sitting = start()
    sitting.wait_for_step(4)
    rank_process(sitting.mark, 1).kill()
    status, printed = sitting.end(40)
    assert status == HARDWARE
    assert "rank 1 of this machine was ended by SIGKILL" in printed
    assert GOES_ON in printed
    reached = read_metrics(tmp_path / "run")[-1]["step"]
    sitting = start()
    sitting.wait_for_step(max(9, reached + 1))
    ranks = [rank_process(sitting.mark, rank) for rank in (0, 1)]
    sitting.launcher.kill()
    again = start()
    status, printed = again.end(240)
    assert status == 0, printed
    assert not any(rank.is_running() for rank in ranks)
    assert not processes_of(sitting.mark)
    run_ranks(train_undisturbed, 2, corpus, tmp_path / "whole", preload=("alpro_stream.run",))
    (losses, weights), (expected, theirs) = learned(tmp_path / "run"), learned(tmp_path / "whole")
    assert losses == expected
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stalled_rank_ends_the_run_in_time(start, rank):
    sitting = start(**{"train.timeout_s": 6, "train.max_steps": 5000})
    sitting.wait_for_step(4)
    rank_process(sitting.mark, rank).send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until("the other rank", lambda: "in vain" in sitting.printed.read_text(), 6 + 10)
    assert time.monotonic() - stopped >= 5
    # The launcher gives the stopped one its time to end by itself before it kills it.
    status, printed = sitting.end(30)
    assert status == HARDWARE
    assert f"rank {1 - rank}: error: rank {1 - rank} of 2 waited " in printed
    assert f"in vain: rank {rank} does not answer: it is stopped, or its machine hangs" in printed
    assert start(**{"train.timeout_s": 60, "train.max_steps": 8}).end(150)[0] == 0


@pytest.fixture(scope="module")
def pretrain(corpus, tmp_path_factory):
    run = tiny_run(corpus, tmp_path_factory.mktemp("prompter"), {"train.max_steps": 1})
    checkpoint = train(RunConfig.model_validate(run)).checkpoint
    return {"task": "pretrain", "prompter.checkpoint": str(checkpoint)}


def prompter_of(sitting, rank):
    """The prompter of a rank as soon as there is one."""
    wait_until("prompter", lambda: prompter_process(sitting.mark, rank) is not None, 150)
    return prompter_process(sitting.mark, rank)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while it starts", "while it trains"])
def test_a_prompter_killed_beside_one_rank_ends_both(start, pretrain, moment):
    sitting = start(**pretrain, **{"train.max_steps": 5000})
    prompter = prompter_of(sitting, 1)
    if moment == "while it trains":
        sitting.wait_for_step(4)
    prompter.kill()
    status, printed = sitting.end(90)
    assert status == HARDWARE
    assert f"rank 1: error: the prompter of rank 1 (pid {prompter.pid}) died with exit status -9" in printed
    assert "rank 0: error: rank 1 failed: the prompter of rank 1" in printed
    assert start(**pretrain, **{"train.max_steps": 8}).end(150)[0] == 0


@pytest.mark.slow
def test_a_stopped_prompter_ends_both_ranks_in_time(start, pretrain):
    sitting = start(**pretrain, **{"train.max_steps": 5000, "prompter.deadline_s": 20})
    prompter = prompter_of(sitting, 0)
    sitting.wait_for_step(4)
    prompter.send_signal(signal.SIGSTOP)
    status, printed = sitting.end(20 + 40)
    assert status == HARDWARE
    assert f"the prompter of rank 0 (pid {prompter.pid}) gave no answer for 20 s" in printed
    assert "rank 1: error: rank 0 failed: the prompter of rank 0" in printed
    assert [json.loads(line) for line in (sitting.run_dir / "metrics.jsonl").read_text().splitlines()]
