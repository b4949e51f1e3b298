"""Command lines that start the ranks of a run on this machine."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path


def train_command(config: str, overrides: Sequence[str], num_ranks: int) -> list[str]:
    """The command that trains `config`: Python itself for one rank, the deepspeed launcher for several."""
    entry = ["--module", "alpro_launch.train", config, *overrides]
    if num_ranks == 1:
        return [sys.executable, "-m", *entry[1:]]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", str(num_ranks)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), *entry]


def launch_environment() -> dict[str, str]:
    """What the ranks find in their environment beside what is there already."""
    # DeepSpeed warns, in every process, about what is the normal case on a machine without a GPU.
    return {} if Path("/dev/nvidiactl").exists() else {"DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A TCP port that nobody listens on now, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
