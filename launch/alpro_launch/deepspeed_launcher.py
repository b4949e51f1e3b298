"""A run on the machines of a hostfile, through the launcher of deepspeed, which reaches them by pdsh over ssh.

Its own ways are mended here where they would be in the way of a run:

- It ends with 1 on SIGTERM, and its ranks have 30 s. Here a file in the folder of the run asks them to save.
- It ends with 0 when pdsh is killed. Here a run is done when its last checkpoint says so.
- It passes arguments through a shell without quoting them. Here the ranks read the resolved configuration from a file.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from alpro_launch.hostfile import Host, num_slots, taken, to_text
from alpro_launch.local_ranks import cpu_environment
from alpro_launch.processes import ended_by, run_all
from alpro_launch.restart import Outcome
from alpro_stream.config import save_config
from alpro_stream.errors import ConfigError
from alpro_stream.exit_status import CONFIGURATION, HARDWARE, INTERRUPTED
from alpro_stream.run import RunConfig
from alpro_stream.stream.cursor import Cursor, num_steps_left
from alpro_stream.train.checkpoint import complete_checkpoints, read_state
from alpro_stream.train.preemption import STOP_FILE

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SSH_S = 30
# A host that is cut off would hold its ssh, and so the end of the run, for as long as TCP does.
_ALIVE = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"
_NOT_FOUND = (126, 127)


class DeepspeedLauncher:
    """Starts the ranks of a run on the hosts that can be reached."""

    def __init__(self, hosts: Sequence[Host], config: RunConfig, address: str | None, port: int) -> None:
        for program in ("pdsh", "ssh"):
            if not shutil.which(program):
                raise ConfigError(
                    f"--hostfile needs {program} on this machine, and it is not there: install it, or start the ranks "
                    "without ssh: `alpro train --nodes` on each host, or `deepspeed --no_ssh`"
                )
        self._hosts, self._config = hosts, config
        self._address, self._port = address, port
        self._there = list(hosts)

    def num_slots(self) -> int:
        """Ranks that the hosts take which ssh reaches now; the others are named."""
        with ThreadPoolExecutor(max_workers=32) as pool:
            problems = dict(zip(self._hosts, pool.map(_ssh_problem, self._hosts), strict=True))
        for host, problem in problems.items():
            if problem:
                print(f"{host.name} cannot be reached by ssh: {problem}", file=sys.stderr, flush=True)
        self._there = [host for host, problem in problems.items() if not problem]
        return num_slots(self._there)

    def launch(self, num_ranks: int) -> Outcome:
        """Runs deepspeed's launcher to its end."""
        logs = self._config.run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        resolved, hostfile = logs / "launch.yaml", logs / "hostfile"
        save_config(self._config, resolved)
        hostfile.write_text(to_text(taken(self._there, num_ranks)), encoding="utf-8")
        stop = self._config.run_dir / STOP_FILE
        # Where the first host is left out, its address is nobody's.
        address = self._address if self._there[0] == self._hosts[0] else None
        environment = {**cpu_environment(), "PDSH_SSH_ARGS_APPEND": os.environ.get("PDSH_SSH_ARGS_APPEND", _ALIVE)}
        try:
            ended = run_all(
                launch_command(hostfile.absolute(), resolved.absolute(), address, self._port),
                [environment],
                ask_to_end=stop.touch,
            )
            was_asked = ended.was_asked or stop.exists()
        finally:
            stop.unlink(missing_ok=True)
        outcome = explain(ended.status)
        if ended.status == 0 and not _is_done(self._config):
            outcome = Outcome(HARDWARE, "the launcher ended before the run was done: was it killed?")
        return replace(outcome, was_asked=was_asked)


def launch_command(hostfile: Path, config: Path, address: str | None, port: int) -> list[str]:
    """The command of deepspeed's launcher.

    Args:
        hostfile: of the hosts to use, all of them.
        config: the resolved configuration.
        address: of the first host; None asks it by `hostname -I`.
        port: on which the ranks meet.
    """
    # --force_multi: a single host that is left is not this machine.
    options = ["--hostfile", str(hostfile), "--force_multi", "--master_port", str(port)]
    options += ["--master_addr", address] if address else []
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *options,
        *("--module", "alpro_launch.train", str(config)),
    ]


def explain(status: int) -> Outcome:
    """What the status of deepspeed's launcher means.

    It is the largest of its hosts'; that of a host is the one of the rank that ended first there, where -9 for SIGKILL
    comes out as 247; 255 is ssh's own.
    """
    if status == 255:
        return Outcome(HARDWARE, "ssh to a host failed, or was cut off")
    if status in _NOT_FOUND:
        return Outcome(CONFIGURATION, f"{sys.executable} is not there on every host: install alike on all of them")
    number = -status if status < 0 else 256 - status if status > 192 else status - 128
    if number in {*signal.Signals} and status != INTERRUPTED:
        return Outcome(HARDWARE, f"a rank or the launcher of its host {ended_by(number)}")
    if status == 1:
        return Outcome(HARDWARE, "deepspeed's launcher failed, or was ended; what it said is above")
    return Outcome(status)


def _ssh_problem(host: Host) -> str:
    """Why a host cannot be reached; empty where it can."""
    try:
        done = subprocess.run(
            [*_SSH, host.name, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SSH_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer for {_SSH_S} s"
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"ssh ended with status {done.returncode}") if done.returncode else ""


def _is_done(config: RunConfig) -> bool:
    found = complete_checkpoints(config.run_dir)
    if not found:
        return False
    state = read_state(found[-1])
    cursor = Cursor.from_dict(state["cursor"])
    return not num_steps_left(cursor.step, state["num_steps"], config.stream.skip_steps)
