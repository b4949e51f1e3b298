"""kill -9 of workers, media processes, nodes and the driver on a Ray cluster: the shards are those of a quiet run."""

import contextlib
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
from shard_runs import DEMO, MARK, ROOT, SHARD, contents, environment, refuse_invalid_tars, run_here, temporaries

from alpro_sharding import ShardConfig, shard
from alpro_stream.config import load_config

VICTIMS = ("worker", "media process", "node", "driver")


class Nodes:
    """A head that runs no tasks, and two nodes of one core that do."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        # A dead node is noticed after two seconds and not after fifteen; one that is only slow is none.
        beats = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
        settings = {**beats, "health_check_timeout_ms": 10_000, "health_check_failure_threshold": 3}
        self._sizes = {"object_store_memory": 80 << 20, "memory": 4 << 30}
        head = {**self._sizes, "num_cpus": 0, "include_dashboard": False, "_system_config": settings}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        for _ in range(2):
            self.add()

    def add(self):
        self._cluster.add_node(**self._sizes, num_cpus=1)

    def replace(self, draw):
        """Ends one of the working nodes at once, and adds another."""
        node = draw.choice(sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id))
        self._cluster.remove_node(node, allow_graceful=False)
        self.add()

    def processes(self, words):
        """Processes of the working nodes with these words in their command line."""
        found = []
        for node in self._cluster.worker_nodes:
            for raylet in node.all_processes["raylet"]:
                for process in _descendants(raylet.process.pid):
                    command = _command_of(process)
                    if words in command:
                        found.append(process.pid)
        return sorted(found)

    def close(self):
        self._cluster.shutdown()


def _descendants(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(tmp_path_factory.mktemp("nodes")).items():
            if name == MARK or name not in os.environ:
                patch.setenv(name, value)
        running = Nodes()
        try:
            yield running
        finally:
            running.close()


class Run:
    """The command as the driver on the cluster, started again whenever it was killed."""

    def __init__(self, nodes, out, *options):
        self._nodes = nodes
        self._command = [*SHARD, DEMO, f"out={out}", *options]
        self._errors = out.parent / "errors.txt"
        self.notes = out / ".ledger" / "train"
        self.start()

    def start(self):
        env = {**environment(self.notes), "RAY_ADDRESS": self._nodes.address}
        with self._errors.open("a") as errors:
            self.driver = subprocess.Popen(
                self._command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )

    def num_done(self):
        return len(list(self.notes.glob("*.json")))

    def wait_for(self, condition):
        """What a condition gives once it holds; nothing when the run ends before."""
        deadline = time.monotonic() + 90
        while not (found := condition()):
            if self.driver.poll() is not None:
                return None
            assert time.monotonic() < deadline, self._errors.read_text()
            time.sleep(0.02)
        return found

    def kill(self, victim, draw):
        """kill -9 of a victim, some fraction of a second after at least one more shard was made.

        Gives whether there was a victim: the run may have ended before.
        """
        before = self.num_done()
        self.wait_for(lambda: self.num_done() > before)
        time.sleep(draw.uniform(0, 0.7))
        if self.driver.poll() is not None:
            return False
        if victim == "driver":
            self.driver.kill()
            self.driver.wait()
            self.start()
        elif victim == "node":
            self._nodes.replace(draw)
        else:
            words = {"worker": "ray::make_shard", "media process": "alpro_sharding.media_process"}[victim]
            return self._kill_one(words, draw)
        return True

    def _kill_one(self, words, draw):
        while pids := self.wait_for(lambda: self._nodes.processes(words)):
            with contextlib.suppress(ProcessLookupError):  # It ended meanwhile: another one.
                os.kill(draw.choice(pids), signal.SIGKILL)
                return True
        return False

    def finish(self):
        try:
            status = self.driver.wait(timeout=150)
        finally:
            self.driver.kill()
        assert status == 0, self._errors.read_text()


def check_kills(nodes, folder, victims, draw, *options):
    """Runs with all these kills have the digests of one without any, made in this process."""
    quiet = load_config(ShardConfig, DEMO, [f"out={folder / 'quiet/shards'}", *options])
    shard(quiet, run=run_here)
    expected = contents(folder / "quiet/shards")
    assert sum(name.endswith(".tar") for name in expected) > 10
    to_kill = list(victims)
    while to_kill:
        out = folder / f"{len(to_kill)} to kill/shards"
        out.parent.mkdir()  # a round without any kill would not get beyond this
        run = Run(nodes, out, *options)
        while to_kill and run.kill(to_kill[0], draw):
            del to_kill[0]
        run.finish()
        assert contents(out) == expected
        refuse_invalid_tars(out)
        assert not temporaries(out)


def seeded():
    seed = random.randrange(10_000)
    print(f"seed {seed}")  # pytest shows it when the test fails
    return random.Random(seed)


def test_one_kill_of_each(nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    draw = seeded()
    # The driver first: the run that replaces it would mend what the other deaths left.
    victims = ["driver", *draw.sample(VICTIMS[:3], 3)]
    check_kills(nodes, tmp_path, victims, draw, "samples_per_shard=1", "frames.fps=1", "frames.size=64")


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_shard", [1, 2, 3])
def test_many_kills(nodes, tmp_path, monkeypatch, samples_per_shard):
    monkeypatch.chdir(ROOT)
    draw = seeded()
    check_kills(nodes, tmp_path, draw.choices(VICTIMS, k=5), draw, f"samples_per_shard={samples_per_shard}")
