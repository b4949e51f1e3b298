"""Two hosts in network namespaces, each with a real sshd: deepspeed's launcher over ssh, and a host that is cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import TwoHosts, wait_until

from alpro_stream.exit_status import HARDWARE, PREEMPTED
from alpro_stream.testing.configs import write_corpus
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.metrics import read_metrics

NEEDED = ("ip", "pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
ENDLESS = {"train.max_steps": 100_000, "train.checkpoint_every": 100_000}


def _missing():
    if os.geteuid():
        return "network namespaces need root"
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)}"
    probe = subprocess.run(["ip", "netns", "add", f"alpro-probe-{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"alpro-probe-{os.getpid()}"], check=True)
    return ""


WHY_NOT = _missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can run"),
]


class Network:
    """Two namespaces with a link between them, and an sshd in each."""

    def __init__(self, folder):
        self.names = [f"alpro-{os.getpid()}-{letter}" for letter in "ab"]
        self.links = [f"al{os.getpid() % 100_000}{letter}" for letter in "ab"]
        self.folder = folder
        self._servers = []

    def build(self):
        _run("ip", "link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "set", link, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            _run("ip", "-n", name, "link", "set", link, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for key in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPidFile none\nPasswordAuthentication no\n"
        )
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        # The file of the user who runs the tests is left alone.
        (self.folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        (self.folder / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in self.names:
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")]
            with (self.folder / f"{name}.log").open("w") as log:
                self._servers.append(subprocess.Popen(self.inside(name, *command), stdout=log, stderr=log))
        for address in ADDRESSES:
            reached = [*self.inside(self.names[0], self.folder / "ssh"), "-o", "ConnectTimeout=2", address, "true"]
            wait_until(lambda command=reached: subprocess.run(command, capture_output=True).returncode == 0, 20)

    def inside(self, name, *command):
        return ["ip", "netns", "exec", name, *map(str, command)]

    def cut(self):
        _run("ip", "-n", self.names[1], "link", "set", self.links[1], "down")

    def processes(self, number):
        """What runs on a host, its sshd apart."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True).stdout
        alive = []
        for pid in map(int, found.split()):
            try:
                if "python" in psutil.Process(pid).exe():
                    alive.append(psutil.Process(pid))
            except psutil.Error:
                continue
        return alive

    def ranks(self, number):
        return [one for one in self.processes(number) if "alpro_launch.train" in one.cmdline()[3:4]]

    def close(self):
        for number in range(2):
            for process in self.processes(number):
                process.kill()
        for server in self._servers:
            server.terminate()
            server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*command):
    subprocess.run([str(word) for word in command], check=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def network(tmp_path):
    folder = tmp_path / "ssh-files"
    folder.mkdir()
    network = Network(folder)
    try:
        network.build()
        yield network
    finally:
        network.close()


@pytest.fixture
def hosts(tmp_path, network):
    hosts = TwoHosts(tmp_path)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))

    def start(*command):
        path = f"{network.folder}:{os.environ['PATH']}"
        return hosts.start(network.inside(network.names[0], *command), PATH=path)

    hosts.on_first = start
    hosts.alpro = lambda *flags: start(
        *(sys.executable, "-m", "alpro_launch.cli", "train", tmp_path / "run.yaml"),
        *("--hostfile", tmp_path / "hosts", "--master-port", hosts.port, *flags),
    )
    yield hosts
    hosts.close()


def nothing_is_left(network, *started):
    wait_until(lambda: not network.processes(0) and not network.processes(1), 60, *started)


def trains(hosts, *started):
    wait_until(lambda: len(read_metrics(hosts.run_dir)) > 2, 120, *started)


def attempts(hosts):
    return [json.loads(line) for line in (hosts.run_dir / "logs/launch.jsonl").read_text().splitlines()]


def test_the_plain_command_of_deepspeed(corpus, hosts, network, tmp_path):
    hosts.config(corpus, **{"train.max_steps": 6})
    started = hosts.on_first(
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", tmp_path / "hosts"),
        *("--master_port", hosts.port, "--module", "alpro_launch.train", tmp_path / "run.yaml", "train.max_steps=4"),
    )
    assert started.end(180) == 0, started.printed()
    assert f"meet at   {ADDRESSES[0]}:{hosts.port} through {network.links[0]}" in started.printed()
    assert "4 steps trained" in started.printed()
    nothing_is_left(network, started)


def test_asked_to_stop_both_hosts_save(corpus, hosts, network):
    hosts.config(corpus, **ENDLESS)
    started = hosts.alpro()
    trains(hosts, started)
    command = next(one for one in network.processes(0) if "alpro_launch.cli" in one.cmdline())
    command.send_signal(signal.SIGTERM)
    assert started.end(120) == PREEMPTED, started.printed()
    assert len(complete_checkpoints(hosts.run_dir)) == 1
    assert not (hosts.run_dir / "stop").exists()
    assert [one["status"] for one in attempts(hosts)] == [PREEMPTED]
    nothing_is_left(network, started)


def test_a_rank_that_is_killed_on_the_other_host_is_mended(corpus, hosts, network):
    hosts.config(corpus, **{"train.max_steps": 150, "train.checkpoint_every": 10, "train.timeout_s": 20})
    started = hosts.alpro("--max-restarts", 1)
    wait_until(lambda: complete_checkpoints(hosts.run_dir), 120, started)
    (rank,) = network.ranks(1)
    rank.kill()
    assert started.end(240) == 0, started.printed()
    first, second = attempts(hosts)
    assert (first["status"], first["ranks"], second["status"], second["ranks"]) == (HARDWARE, 2, 0, 2)
    assert "was ended by SIGKILL" in first["cause"]
    assert second["begun_from"] == first["ended_at"] is not None
    nothing_is_left(network, started)


def test_a_host_that_is_cut_off_is_left_out(corpus, hosts, network):
    """Its link goes down in the middle of a step: both hosts end in time, and the run goes on without it."""
    hosts.config(corpus, **{"train.max_steps": 300, "train.checkpoint_every": 10, "train.timeout_s": 20})
    started = hosts.alpro("--max-restarts", 1)
    wait_until(lambda: complete_checkpoints(hosts.run_dir), 120, started)
    (cut_off,) = network.ranks(1)
    network.cut()
    begun = time.monotonic()
    wait_until(lambda: not cut_off.is_running() and len(network.ranks(0)) == 0, 20 + 15 + 20, started)
    print(f"both ranks had ended {time.monotonic() - begun:.0f} s after the cut")
    assert started.end(240) == 0, started.printed()
    assert "rank 1 does not answer: it is stopped, or its machine hangs" in started.printed()
    assert f"{ADDRESSES[1]} cannot be reached by ssh" in started.printed()
    assert "with 1 ranks, from step-0000" in started.printed()
    first, second = attempts(hosts)
    assert (first["status"], first["ranks"], second["status"], second["ranks"]) == (HARDWARE, 2, 0, 1)
    assert read_metrics(hosts.run_dir)[-1]["step"] == 300
    nothing_is_left(network, started)


def test_a_host_that_cannot_be_reached_is_named_before_anything_starts(corpus, hosts, network):
    hosts.config(corpus)
    network.cut()
    started = hosts.alpro()
    assert started.end(60) == HARDWARE
    assert f"{ADDRESSES[1]} cannot be reached by ssh: ssh: connect to host" in started.printed()
    assert "not all hosts of" in started.printed()
    assert "Traceback" not in started.printed()
    assert not hosts.run_dir.exists()
