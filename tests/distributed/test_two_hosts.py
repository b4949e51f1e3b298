"""Two hosts made on one machine, by deepspeed's launcher on two loopback addresses and by the variables of Slurm."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from hosts import HOSTS, TwoHosts, wait_until

from alpro_launch.launch_log import read_launch_log
from alpro_stream.exit_status import CONFIGURATION, HARDWARE, PREEMPTED
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.preemption import STOP_FILE

ROOT = Path(__file__).resolve().parents[2]
# Those of tests/resume/test_elastic.py: the checkpoint is that of step 4.
STEPS = {
    "task": "pretrain",
    "losses.pem.weight": 0,
    "train.max_steps": 7,
    "train.checkpoint_every": 4,
    "train.engine.zero_stage": 1,
    "model.text.dropout": 0,
    "model.video.drop_path": 0,
    "train.optimizer.weight_decay": 0.5,
}
TOLERANCES = {"loss/vtc": 1.2e-6, "loss/vtm": 1.2e-6, "loss/mlm": 1.2e-6, "gradient_norm": 1.2e-6}
ENDLESS = {"train.max_steps": 100_000, "train.checkpoint_every": 100_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def hosts(tmp_path):
    hosts = TwoHosts(tmp_path)
    yield hosts
    hosts.close()


def ended(*started):
    statuses = [one.end(90) for one in started]
    for one in started:
        one.nothing_is_left()
    return statuses


def checkpoints(hosts):
    return [path.name for path in complete_checkpoints(hosts.run_dir)]


def trains(hosts, *started):
    wait_until(lambda: len(read_metrics(hosts.run_dir)) > 2, 90, *started)


def test_on_two_hosts_of_which_one_is_late_then_on_one_then_on_two(hosts, tmp_path):
    """From the example clips on, which are made to shards first."""
    shard = [sys.executable, "-m", "alpro_launch.cli", "shard", ROOT / "configs/demo/shard.yaml"]
    settings = [f"manifest={ROOT}/examples/clips/manifest.jsonl", f"work_dir={tmp_path}"]
    assert ended(hosts.start([*shard, *settings])) == [0]
    hosts.config(tmp_path / "shards", **STEPS)
    first = hosts.deepspeed(0)
    first.wait_for(f"meet at   127.0.0.1:{hosts.port} through lo", 90)
    assert "ranks     2 on 2 nodes, as found in the variables of the launcher" in first.printed()
    assert not read_metrics(hosts.run_dir)
    assert ended(first, hosts.deepspeed(1)) == [0, 0]
    shutil.copytree(hosts.run_dir, tmp_path / "undisturbed")

    shutil.rmtree(complete_checkpoints(hosts.run_dir)[-1])
    # Asked to stop before it begins: it makes a step, saves it, and its status goes through deepspeed's launcher.
    (hosts.run_dir / STOP_FILE).touch()
    assert ended(hosts.deepspeed(0, hosts=HOSTS[:1])) == [PREEMPTED]
    assert checkpoints(hosts) == ["step-000004", "step-000005"]
    assert not (hosts.run_dir / STOP_FILE).exists()

    assert ended(hosts.deepspeed(0), hosts.deepspeed(1)) == [0, 0]
    ours, theirs = read_metrics(hosts.run_dir), read_metrics(tmp_path / "undisturbed")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 8))
    for one, other in zip(ours, theirs, strict=True):
        for name, tolerance in TOLERANCES.items():
            assert one[name] == pytest.approx(other[name], rel=tolerance), f"{name} of step {one['step']}"


@pytest.mark.slow
def test_a_host_that_never_starts_is_named(corpus, hosts):
    hosts.config(corpus, **{"train.timeout_s": 3})
    first = hosts.deepspeed(0)
    assert ended(first) == [HARDWARE]
    assert "rank 0: error: rank 1 of 2 did not come within 3 s; there is rank 0 on" in first.printed()
    assert "Traceback" not in first.printed()


def test_a_host_that_is_killed_ends_the_other_by_name(corpus, hosts):
    hosts.config(corpus, **ENDLESS, **{"train.timeout_s": 20})
    first, second = hosts.deepspeed(0), hosts.deepspeed(1)
    trains(hosts, first, second)
    second.kill()
    assert first.end(30) == HARDWARE
    first.nothing_is_left()
    assert "rank 0: error: rank 0 of 2 waited" in first.printed()
    assert "rank 1 has ended: it was killed" in first.printed()


@pytest.mark.slow
def test_the_ranks_of_a_launcher_that_is_killed_save_and_end(corpus, hosts):
    """deepspeed's launcher leaves them behind."""
    hosts.config(corpus, **ENDLESS)
    only = hosts.deepspeed(0, hosts=HOSTS[:1])
    trains(hosts, only)
    (launcher,) = [one for one in only.processes() if "deepspeed.launcher.launch" in one.cmdline()]
    launcher.kill()
    only.nothing_is_left()
    assert len(checkpoints(hosts)) == 1


@pytest.mark.slow
def test_another_version_on_one_host_is_named_on_both(corpus, hosts, tmp_path):
    """Its own folder of packages comes first there, with another version of this one."""
    info = tmp_path / "packages" / "alpro_stream-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alpro-stream\nVersion: 9.9.9\n")
    hosts.config(corpus)
    both = hosts.deepspeed(0), hosts.deepspeed(1, PYTHONPATH=str(info.parent))
    assert ended(*both) == [CONFIGURATION, CONFIGURATION]
    for rank, one in enumerate(both):
        assert f"rank {rank}: error: the ranks run different programs: alpro-stream 0.1.0 on " in one.printed()
        assert "and 9.9.9 on " in one.printed()


def test_two_tasks_of_slurm(corpus, hosts):
    hosts.config(corpus, **{"train.max_steps": 2})
    step = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(hosts.port),
    }
    command = [sys.executable, "-m", "alpro_launch.train", hosts.folder / "run.yaml"]

    def job(**variables):
        places = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1)]
        return [hosts.start(command, **step, **place, **variables) for place in places]

    hosts.run_dir.mkdir()
    (hosts.run_dir / STOP_FILE).touch()
    assert ended(*job()) == [PREEMPTED, PREEMPTED]
    tasks = job(SLURM_RESTART_COUNT="1")
    assert ended(*tasks) == [0, 0]
    keys = ("attempt", "job", "requeued", "ranks", "begun_from", "ended_at", "status")
    assert [tuple(one[key] for key in keys) for one in read_launch_log(hosts.run_dir)] == [
        (1, "7", 0, 2, None, "step-000001", PREEMPTED),
        (2, "7", 1, 2, "step-000001", "step-000002", 0),
    ]
    assert "ranks     2 on 1 node, as found in the variables of Slurm" in tasks[0].printed()
    assert f"\nconfiguration, also in {hosts.run_dir / 'config.yaml'}:\n" in tasks[0].printed()
    assert f"meet at   localhost:{hosts.port} through lo" in tasks[0].printed()
    assert json.loads((complete_checkpoints(hosts.run_dir)[-1] / "state.json").read_text())["world_size"] == 2


def test_a_task_of_slurm_that_is_asked_to_end_while_it_waits(corpus, hosts):
    hosts.config(corpus)
    step = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": str(hosts.port)}
    task = hosts.start([sys.executable, "-m", "alpro_launch.train", hosts.folder / "run.yaml"], **step, **place)
    wait_until(lambda: read_launch_log(hosts.run_dir), 90, task)
    os.kill(task.pid, signal.SIGTERM)
    assert ended(task) == [PREEMPTED]
    assert task.printed().count("asked to stop before it began") == 1
    (attempt,) = read_launch_log(hosts.run_dir)
    assert (attempt["status"], attempt["ended_at"]) == (PREEMPTED, None)


def alpro(hosts, node, *arguments):
    """`alpro train` on one of two hosts."""
    place = ("--nodes", "2", "--node-rank", node, "--master-addr", HOSTS[0], "--master-port", hosts.port)
    return hosts.start(
        [sys.executable, "-m", "alpro_launch.cli", "train", hosts.folder / "run.yaml", *arguments, *place]
    )


def test_two_runs_with_one_port(corpus, hosts):
    """The second one is told whose it is, on both hosts, and trains when the first has ended; that misses nobody."""
    hosts.config(corpus, **{"train.max_steps": 1, "train.timeout_s": 200})
    first = [alpro(hosts, 0)]
    first[0].wait_for(f"meet at   {HOSTS[0]}:{hosts.port}", 90)
    other = hosts.folder / "other"
    second = [alpro(hosts, node, f"run_dir={other}", "--max-restarts", "5") for node in (0, 1)]
    second[0].wait_for(f"rank 0: error: port {hosts.port} of ", 90)
    second[1].wait_for(
        f"rank 1: error: another run has {HOSTS[0]}:{hosts.port}: the training in {hosts.run_dir} with 2 ranks, and "
        f"this rank is one of the training in {other} with 2 ranks",
        90,
    )
    first.append(alpro(hosts, 1))
    assert ended(*first, *second) == [0, 0, 0, 0]
    # Both had the status that another attempt may mend.
    assert all("starting again in 5 s" in one.printed() for one in second)
    for run_dir in (hosts.run_dir, other):
        assert [line["step"] for line in read_metrics(run_dir)] == [1]


def test_ranks_of_torchrun(corpus, hosts):
    hosts.config(corpus, **{"train.max_steps": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", hosts.port]
    started = hosts.start([*command, "-m", "alpro_launch.train", hosts.folder / "run.yaml", "train.checkpoint_every=1"])
    assert ended(started) == [0]
    assert "ranks     2 on 1 node, as found in the variables of the launcher" in started.printed()
    assert checkpoints(hosts) == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_alpro_on_each_of_two_hosts(corpus, hosts):
    """A rank that is killed on one host: the commands of both hosts start again, and go on from the checkpoint."""
    hosts.config(corpus, **{"train.max_steps": 60, "train.checkpoint_every": 4, "train.timeout_s": 20})
    both = [alpro(hosts, node, "--max-restarts", "1") for node in (0, 1)]
    wait_until(lambda: checkpoints(hosts), 60, *both)
    (rank,) = [one for one in both[1].processes() if "alpro_launch.train" in one.cmdline()]
    rank.kill()
    assert ended(*both) == [0, 0]
    assert "rank 0 of this machine was ended by SIGKILL (out of memory, perhaps); the same command" in both[1].printed()
    assert all("starting again in 5 s with 1 ranks, from step-0000" in one.printed() for one in both)
    attempts = [json.loads(line) for line in (hosts.run_dir / "logs/launch.jsonl").read_text().splitlines()]
    assert [(one["attempt"], one["status"]) for one in attempts] == [(1, HARDWARE), (2, 0)]
    assert attempts[1]["begun_from"] == attempts[0]["ended_at"]
    assert attempts[1]["ended_at"] == "step-000060"
    assert [line["step"] for line in read_metrics(hosts.run_dir)] == list(range(1, 61))
