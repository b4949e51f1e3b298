"""The ranks of a run on this machine: one command, and an environment for each.

They are our own children, so that none of them outlives the command, however that ends. Where the run is on several
machines, the command is started on each of them.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpro_stream.errors import ConfigError

DEFAULT_PORT = 29500
"""On which the ranks of several machines meet; that of torch and deepspeed."""


@dataclass(frozen=True)
class Node:
    """This machine among those of a run.

    Attributes:
        num_nodes: machines.
        node_rank: of this one.
        address: of the first one, as all of them see it; None for a machine alone.
        port: on which the first rank listens there; None for one that is free now.
    """

    num_nodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.num_nodes:
            raise ConfigError(
                f"--node-rank {self.node_rank} of --nodes {self.num_nodes}: nodes are numbered from 0 to "
                f"{self.num_nodes - 1}, each with another number"
            )
        if self.num_nodes > 1 and not self.address:
            raise ConfigError(
                f"--nodes {self.num_nodes} needs --master-addr: an address of node 0 that all nodes can reach"
            )


def train_command(config: str, overrides: Sequence[str]) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "alpro_launch.train", config, *overrides]


def preflight_command(config: str, overrides: Sequence[str], report: str | None) -> list[str]:
    """As `train_command`, for what is looked at before; `report` is a file for that."""
    return [sys.executable, "-m", "alpro_launch.preflight", config, *overrides, *(["--json", report] if report else [])]


def rank_environments(num_ranks: int, node: Node = Node()) -> list[dict[str, str]]:
    """What tells the ranks of this machine apart, as `alpro_launch.topology` reads it.

    Args:
        num_ranks: on this machine, and on each of the others.
        node: this machine.

    Raises:
        ConfigError: there is not even one rank.
    """
    if num_ranks < 1:
        raise ConfigError(f"--ranks {num_ranks}: at least 1 is needed")
    port = node.port or (DEFAULT_PORT if node.num_nodes > 1 else free_port())
    common = {
        **cpu_environment(),
        "WORLD_SIZE": str(num_ranks * node.num_nodes),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_WORLD_SIZE": str(node.num_nodes),
        "MASTER_ADDR": node.address or "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    first = node.node_rank * num_ranks
    return [{**common, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(num_ranks)]


def cpu_environment() -> dict[str, str]:
    """DeepSpeed warns, in every process, about what is the normal case on a machine without a GPU."""
    return {} if Path("/dev/nvidiactl").exists() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A TCP port that nobody listens on now, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
