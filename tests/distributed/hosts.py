"""Hosts made on one machine: what is started on each of them, as a user would start it there."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil

from alpro_launch.local_ranks import free_port
from alpro_stream.config import save_config
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import tiny_run

HOSTS = ("127.0.0.1", "127.0.0.2")
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Started:
    """A command with an own session, so that all that it started can be found, and killed, at the end."""

    def __init__(self, command, log, **variables):
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                env={**inherited, **ENVIRONMENT, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def printed(self):
        return self._log.read_text()

    def processes(self):
        """All that are alive in its session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def ranks(self):
        return [one for one in self.processes() if "alpro_launch.train" in _words(one) and _words(one)[1] == "-u"]

    def wait_for(self, text, seconds=60):
        wait_until(lambda: text in self.printed() or self._process.poll() is not None, seconds, self)
        assert text in self.printed(), self.printed()

    def end(self, seconds=60):
        """The status, once it has ended by itself."""
        wait_until(lambda: self._process.poll() is not None, seconds, self)
        return self._process.returncode

    def nothing_is_left(self, seconds=20):
        wait_until(lambda: not self.processes(), seconds, self)

    def kill(self):
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # It ended with the one before it.
                process.send_signal(signal.SIGKILL)
        self._process.wait()


def _words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_until(condition, seconds, *shown):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "\n".join(one.printed() for one in shown)
        time.sleep(0.05)


class TwoHosts:
    """The hosts of a run; all that was started is killed at the end."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def config(self, corpus, **changes):
        """Writes the configuration of a run in `folder`, with one thread, so that sums have one order."""
        self.run_dir = self.folder / "run"
        tree = tiny_run(corpus, self.run_dir, {"train.engine.num_threads": 1, **changes})
        save_config(RunConfig.model_validate(tree), self.folder / "run.yaml")
        self.port = free_port()

    def start(self, command, **variables):
        one = Started(command, self.folder / f"log{len(self.started)}.txt", **variables)
        self.started.append(one)
        return one

    def deepspeed(self, node, *overrides, hosts=HOSTS, **variables):
        """The launcher of deepspeed on one of the hosts, without ssh."""
        hostfile = self.folder / "hosts"
        hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
        return self.start(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--no_ssh"),
                *("--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", self.port),
                *("--module", "alpro_launch.train", self.folder / "run.yaml", *overrides),
            ],
            **variables,
        )

    def close(self):
        for one in self.started:
            one.kill()
