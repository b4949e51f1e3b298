"""When a run is started again, and with what; `Launcher`s that only say how they ended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alpro_launch import deepspeed_launcher, restart
from alpro_launch.checkpoint_view import run_view
from alpro_launch.deepspeed_launcher import DeepspeedLauncher, explain, launch_command
from alpro_launch.hostfile import Host, read_hostfile
from alpro_launch.launch_log import LAUNCH_LOG, logged_in_slurm, read_launch_log
from alpro_launch.processes import Ended, noting_requests, run_all
from alpro_launch.restart import (
    NextAttempt,
    Outcome,
    allowed_ranks,
    back_off_s,
    keep_training,
    next_attempt,
)
from alpro_stream.config import save_config
from alpro_stream.errors import RankError
from alpro_stream.exit_status import BUG, CONFIGURATION, DATA, HARDWARE, INTERRUPTED, PREEMPTED
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import tiny_run
from alpro_stream.train.checkpoint import checkpoint_name


def test_the_wait_doubles_up_to_five_minutes():
    assert [back_off_s(failures) for failures in (1, 2, 3, 6, 7, 8, 1000)] == [5, 10, 20, 160, 300, 300, 300]


def test_the_allowed_numbers_of_ranks():
    assert allowed_ranks(16, 1) == [1, 2, 4, 8, 16]
    assert allowed_ranks(12, 2) == [1, 2, 3, 6]


@pytest.mark.parametrize("status", [0, DATA, BUG, PREEMPTED, CONFIGURATION, INTERRUPTED, 2])
def test_what_another_attempt_does_not_mend(status):
    assert next_attempt(status, 1, 5, 8, [1, 2, 4, 8]) == NextAttempt(0)


def test_a_failure_of_the_hardware_is_tried_again_with_what_is_left():
    allowed = allowed_ranks(16, 1)
    assert next_attempt(HARDWARE, 1, 3, 16, allowed) == NextAttempt(16, 5)
    assert next_attempt(HARDWARE, 3, 3, 12, allowed) == NextAttempt(8, 20)
    assert next_attempt(HARDWARE, 4, 3, 16, allowed) == NextAttempt(0, reason="--max-restarts 3 is used up")
    assert next_attempt(HARDWARE, 1, 0, 16, allowed) == NextAttempt(0)
    none = next_attempt(HARDWARE, 1, 3, 1, [2, 4])
    assert none == NextAttempt(0, reason="1 ranks are left, and the run needs one of 2, 4")


class Script:
    """A launcher whose attempts end as written, some of them after a checkpoint."""

    def __init__(self, run_dir, attempts, slots=8):
        self.run_dir, self.attempts, self.slots = run_dir, list(attempts), slots
        self.started = []

    def num_slots(self):
        return self.slots

    def launch(self, num_ranks):
        self.started.append(num_ranks)
        status, step, self.slots = self.attempts.pop(0)
        if step:
            folder = self.run_dir / "checkpoints" / checkpoint_name(step)
            folder.mkdir(parents=True)
            (folder / "COMPLETE").touch()
        return Outcome(status, f"ended with {status}" if status else "")


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(restart, "terminated_within", lambda seconds: bool(found.append(seconds)))
    return found


def test_attempts_until_it_is_done(tmp_path, waits, capsys):
    script = Script(tmp_path, [(HARDWARE, 0, 8), (HARDWARE, 4, 6), (HARDWARE, 0, 8), (0, 9, 8)])
    assert keep_training(script, 8, allowed_ranks(16, 1), 2, tmp_path).status == 0
    # The second one came further, so its failure counts as the first again.
    assert (script.started, waits) == ([8, 8, 4, 8], [5, 5, 10])
    log = read_launch_log(tmp_path)
    assert [(one["attempt"], one["ranks"], one["status"], one["begun_from"], one["ended_at"]) for one in log] == [
        (1, 8, HARDWARE, None, None),
        (2, 8, HARDWARE, None, "step-000004"),
        (3, 4, HARDWARE, "step-000004", "step-000004"),
        (4, 8, 0, "step-000004", "step-000009"),
    ]
    assert [one["next_ranks"] for one in log] == [8, 4, 8, 0]
    said = capsys.readouterr().err
    assert (
        "error: ended with 69\nstarting again in 5 s with 8 ranks, from the beginning (allowed numbers of ranks: 1, 2"
        in said
    )
    assert "starting again in 5 s with 4 ranks, from step-000004" in said


@pytest.mark.parametrize("status", [CONFIGURATION, PREEMPTED])
def test_no_attempt_after_what_would_fail_again_or_was_asked_for(tmp_path, waits, status):
    script = Script(tmp_path, [(status, 0, 8)])
    assert keep_training(script, 8, [8], 5, tmp_path).status == status
    assert (len(read_launch_log(tmp_path)), waits) == (1, [])


def test_restarts_are_used_up_and_no_host_is_left(tmp_path, waits, capsys):
    assert keep_training(Script(tmp_path, [(HARDWARE, 0, 8)] * 3), 8, [8], 2, tmp_path).status == HARDWARE
    assert "--max-restarts 2 is used up" in capsys.readouterr().err
    assert keep_training(Script(tmp_path, [(HARDWARE, 0, 0)]), 8, [1, 8], 2, tmp_path).status == HARDWARE
    assert "0 ranks are left, and the run needs one of 1, 8" in capsys.readouterr().err
    # The log spans both commands.
    assert [one["attempt"] for one in read_launch_log(tmp_path)] == [1, 2, 3, 4]


def test_no_attempt_after_a_failure_of_a_run_that_was_asked_to_stop(tmp_path, waits):
    """A full disk while it saves, for example."""

    class Asked(Script):
        def launch(self, num_ranks):
            return dataclasses.replace(super().launch(num_ranks), was_asked=True)

    ended = keep_training(Asked(tmp_path, [(HARDWARE, 4, 8)]), 8, [8], 5, tmp_path)
    assert (ended.status, ended.was_asked, waits) == (HARDWARE, True, [])


def test_who_does_not_save_in_time_has_failed():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('there', flush=True); time.sleep(60)"
    )
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ended = run_all([sys.executable, "-c", code], saving_s=0.5, grace_s=0.2)
    assert ended == (-signal.SIGKILL, 0, True)


def test_asked_to_end_while_it_waits(tmp_path, capsys):
    script = Script(tmp_path, [(HARDWARE, 0, 8)])
    started = time.monotonic()
    with noting_requests():  # Without a handler the signal would end pytest.
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert keep_training(script, 8, [8], 5, tmp_path).status == PREEMPTED
    assert time.monotonic() - started < 4
    assert "\nasked to stop while it waited to start again; the same command goes on\n" in capsys.readouterr().err
    (attempt,) = read_launch_log(tmp_path)
    assert [attempt[key] for key in ("status", "was_asked", "next_ranks")] == [HARDWARE, True, 0]


def test_asked_to_end_while_it_asks_the_hosts(tmp_path, monkeypatch):
    for name, text in (("ssh", "#!/bin/sh\nkill -TERM $PPID\n"), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    save_config(RunConfig.model_validate(tiny_run(tmp_path, tmp_path / "run")), tmp_path / "run.yaml")
    command = [
        sys.executable,
        "-m",
        "alpro_launch.cli",
        "train",
        tmp_path / "run.yaml",
        "--hostfile",
        tmp_path / "hosts",
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == PREEMPTED, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("asked to stop before it began")
    assert not (tmp_path / "run").exists()


def test_inspecting_a_run_shows_its_attempts(tmp_path, waits):
    keep_training(Script(tmp_path, [(HARDWARE, 4, 8), (0, 9, 8)]), 8, [8], 1, tmp_path)
    view = run_view(tmp_path)
    assert view["checkpoints"] == ["step-000004", "step-000009"]
    assert [(one["attempt"], one["status"], one["cause"]) for one in view["attempts"]] == [
        (1, HARDWARE, "ended with 69"),
        (2, 0, ""),
    ]
    assert "attempts" not in run_view(tmp_path / "nowhere")


def test_a_line_that_was_cut_off_does_not_hide_the_others(tmp_path):
    path = tmp_path / LAUNCH_LOG
    path.parent.mkdir()
    path.write_text(json.dumps({"attempt": 1}) + '\n{"attem')
    assert read_launch_log(tmp_path) == [{"attempt": 1}]
    assert read_launch_log(tmp_path / "nowhere") == []


JOB = {"SLURM_JOB_ID": "4711"}


def test_the_first_task_of_a_job_writes_its_beginning_and_its_end(tmp_path):
    def checkpoint(step, status):
        Script(tmp_path, [(status, step, 8)]).launch(8)
        return status

    def seen():
        (last,) = read_launch_log(tmp_path)[-1:]
        assert "status" not in last
        assert last["begun_from"] == "step-000004"
        raise RankError("rank 1 has ended")

    assert logged_in_slurm(tmp_path, 8, JOB, lambda: checkpoint(4, PREEMPTED)) == PREEMPTED
    with pytest.raises(RankError):
        logged_in_slurm(tmp_path, 8, JOB | {"SLURM_RESTART_COUNT": "1"}, seen)
    with pytest.raises(KeyboardInterrupt):
        logged_in_slurm(tmp_path, 4, JOB | {"SLURM_RESTART_COUNT": "2"}, lambda: signal.raise_signal(signal.SIGINT))
    keys = ("attempt", "job", "requeued", "ranks", "begun_from", "ended_at", "status")
    assert [tuple(one[key] for key in keys) for one in read_launch_log(tmp_path)] == [
        (1, "4711", 0, 8, None, "step-000004", PREEMPTED),
        (2, "4711", 1, 8, "step-000004", "step-000004", HARDWARE),
        (3, "4711", 2, 4, "step-000004", "step-000004", INTERRUPTED),
    ]


def test_an_attempt_that_was_lost_with_its_node_is_there_and_keeps_its_number(tmp_path, waits):
    """The next one is of another job, or of `alpro train`."""
    code = (
        "import os, sys; from pathlib import Path; from alpro_launch.launch_log import logged_in_slurm; "
        "logged_in_slurm(Path(sys.argv[1]), 8, {'SLURM_JOB_ID': '7'}, lambda: os.kill(os.getpid(), 9))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    keep_training(Script(tmp_path, [(0, 9, 8)]), 8, [8], 0, tmp_path)
    lost, last = run_view(tmp_path)["attempts"]
    assert (lost["attempt"], lost["job"], "status" in lost) == (1, "7", False)
    assert (last["attempt"], last["status"], last["ended_at"]) == (2, 0, "step-000009")


@pytest.mark.parametrize(
    ("status", "expected", "cause"),
    [
        (0, 0, ""),
        (DATA, DATA, ""),
        (PREEMPTED, PREEMPTED, ""),
        (INTERRUPTED, INTERRUPTED, ""),
        (247, HARDWARE, "was ended by SIGKILL"),
        (245, HARDWARE, "was ended by SIGSEGV"),
        (137, HARDWARE, "was ended by SIGKILL"),
        (-15, HARDWARE, "was ended by SIGTERM"),
        (255, HARDWARE, "ssh to a host failed"),
        (127, CONFIGURATION, "is not there on every host"),
        (1, HARDWARE, "deepspeed's launcher failed"),
    ],
)
def test_what_the_status_of_deepspeeds_launcher_means(status, expected, cause):
    outcome = explain(status)
    assert outcome.status == expected
    assert cause in outcome.cause
    assert bool(cause) == bool(outcome.cause)


def test_deepspeeds_launcher_understands_the_command(tmp_path):
    from deepspeed.launcher.runner import parse_args

    command = launch_command(tmp_path / "hosts", tmp_path / "run.yaml", "10.0.0.1", 6000)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    found = parse_args(command[3:])
    assert (found.hostfile, found.master_addr, found.master_port) == (str(tmp_path / "hosts"), "10.0.0.1", 6000)
    assert (found.module, found.force_multi, found.user_script) == (True, True, "alpro_launch.train")
    assert found.user_args == [str(tmp_path / "run.yaml")]
    assert parse_args(launch_command(tmp_path, tmp_path, None, 1)[3:]).master_addr == ""


SSH = "#!/bin/sh\n[ ! -e {folder}/$5-is-down ]\n"


def test_the_address_of_a_host_that_is_left_out_is_not_where_the_others_meet(tmp_path, monkeypatch, capsys):
    for name, text in (("ssh", SSH.format(folder=tmp_path)), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands = []
    monkeypatch.setattr(
        deepspeed_launcher, "run_all", lambda command, *_, **__: commands.append(command) or Ended(HARDWARE)
    )
    config = RunConfig.model_validate(tiny_run(tmp_path, tmp_path / "run"))
    launcher = DeepspeedLauncher([Host("node1", 2), Host("node2", 2)], config, "10.0.0.1", 6000)

    def started(num_ranks):
        assert launcher.num_slots() == num_ranks
        launcher.launch(num_ranks)
        return read_hostfile(tmp_path / "run/logs/hostfile"), "10.0.0.1" in commands[-1]

    assert started(4) == ([Host("node1", 2), Host("node2", 2)], True)
    (tmp_path / "node1-is-down").touch()
    assert started(2) == ([Host("node2", 2)], False)
    assert "node1 cannot be reached by ssh" in capsys.readouterr().err
    (tmp_path / "node1-is-down").rename(tmp_path / "node2-is-down")
    assert started(2) == ([Host("node1", 2)], True)
