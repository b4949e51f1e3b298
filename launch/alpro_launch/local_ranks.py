"""The ranks of a run on this machine: one command, and an environment for each.

On several nodes the deepspeed launcher starts the same entry. Here the ranks are our own children, so that none of them
outlives the command, however that ends.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path


def train_command(config: str, overrides: Sequence[str]) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "alpro_launch.train", config, *overrides]


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """What tells the ranks apart, as `alpro_stream.train.distributed.join_world` reads it."""
    # DeepSpeed warns, in every process, about what is the normal case on a machine without a GPU.
    common = {} if Path("/dev/nvidiactl").exists() else {"DS_ACCELERATOR": "cpu"}
    common |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def free_port() -> int:
    """A TCP port that nobody listens on now, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
