"""Which rank this is, of how many, and where they meet: found in the environment that the launcher or Slurm made.

`alpro_stream.train.distributed.join_world` reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torch
does. `alpro train`, deepspeed and torchrun set them; `srun` does not, and they are made from its own here.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

from alpro_launch.node_list import expand_node_list
from alpro_stream.errors import ConfigError, RankError
from alpro_stream.train.roll_call import own_host

_RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Below the ports that Linux gives to outgoing connections, and of its own for each job.
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 15_000, 15_000
_RESOLVE_S = 1.0


@dataclass(frozen=True)
class Topology:
    """The place of a process in a run.

    Attributes:
        rank: over all nodes.
        local_rank: on this node; the number of its GPU.
        num_ranks: of the run.
        num_nodes: that they are on; None where the launcher does not tell.
        address: of the first rank's machine; None for a rank alone.
        port: on which the first rank listens; None for a rank alone.
        found_in: what made the environment.
    """

    rank: int
    local_rank: int
    num_ranks: int
    num_nodes: int | None
    address: str | None
    port: int | None
    found_in: Literal["launcher", "Slurm", "alone"]

    def environment(self) -> dict[str, str]:
        """The variables that torch and DeepSpeed read."""
        values = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.num_ranks}
        where = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in {**values, **where}.items() if value is not None}


def find_topology(environment: Mapping[str, str]) -> Topology:
    """The place of this process: from a launcher's variables, else from those of a Slurm step, else alone.

    Raises:
        ConfigError: variables are missing, are no numbers, or contradict each other.
    """
    # LOCAL_RANK alone is what DeepSpeed is told by a rank that is alone, and its children find it.
    if any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return _of_launcher(environment)
    if "SLURM_STEP_NODELIST" in environment:
        return _of_slurm(environment)
    num_tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environment and num_tasks != "1":
        raise ConfigError(
            f"this is the batch script of a Slurm job with SLURM_NTASKS={num_tasks}, and not a task of it: start the "
            "ranks with srun, or `alpro train --ranks` on one node"
        )
    return Topology(0, 0, 1, 1, None, None, "alone")


def _of_launcher(environment: Mapping[str, str]) -> Topology:
    needed: tuple[str, ...] = _RANK_NAMES
    if environment.get("WORLD_SIZE") != "1":
        needed += ("MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        there = ", ".join(f"{name}={environment[name]}" for name in needed if environment.get(name))
        raise ConfigError(
            f"{there} without {', '.join(missing)}: a launcher sets all of them. Start the ranks with `alpro train`, "
            "deepspeed, torchrun or srun, or unset what is left over from another program"
        )
    rank, num_ranks, local_rank = (_number(environment, name) for name in _RANK_NAMES)
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in environment and _number(environment, name) >= _number(environment, size):
            raise ConfigError(
                f"{name}={environment[name]} and {size}={environment[size]} contradict each other: ranks count from 0"
            )
    # deepspeed's name for it, and torchrun's.
    nodes = next((name for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE") if name in environment), None)
    return Topology(
        rank,
        local_rank,
        num_ranks,
        _number(environment, nodes) if nodes else None,
        environment.get("MASTER_ADDR"),
        _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None,
        "launcher",
    )


def _of_slurm(environment: Mapping[str, str]) -> Topology:
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID")
    if missing := [name for name in needed if not environment.get(name)]:
        raise ConfigError(
            f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']} without {', '.join(missing)}: srun sets all of "
            "them. Start the ranks with srun --ntasks=N, or unset Slurm's variables"
        )
    rank, local_rank, num_ranks, job = (_number(environment, name) for name in needed)
    if rank >= num_ranks:
        raise ConfigError(f"SLURM_PROCID={rank} and SLURM_NTASKS={num_ranks} contradict each other: tasks count from 0")
    # With --gpus-per-task=1 a task sees its own GPU alone, which is number 0 to it.
    if environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:
        local_rank = 0
    nodes = expand_node_list(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT") or str(_FIRST_SLURM_PORT + job % _NUM_SLURM_PORTS)
    return Topology(
        rank,
        local_rank,
        num_ranks,
        len(nodes),
        environment.get("MASTER_ADDR") or nodes[0],
        _number({"MASTER_PORT": port}, "MASTER_PORT"),
        "Slurm",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise ConfigError(f"{name}={text}: expected a whole number, as launchers set it")
    return int(text)


def interface_to(address: str, timeout_s: float) -> str | None:
    """The network interface of this machine from which another machine is reached; None where it has no name.

    Args:
        address: of the other one.
        timeout_s: longest wait for it to have a name: that of a Kubernetes pod begins with the pod.

    Raises:
        RankError: its name has no address, or there is no way to it.
    """
    deadline, said = time.monotonic() + timeout_s, False
    while True:
        try:
            own = own_host(address)
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RankError(
                    f"the first rank's machine {address!r} cannot be reached from {socket.gethostname()} ({error}); "
                    "set --master-addr of alpro, --master_addr of deepspeed or MASTER_ADDR to an address that all see"
                ) from error
            if not said:
                print(f"waiting for {address} to have an address ({error})", file=sys.stderr, flush=True)
                said = True
        time.sleep(_RESOLVE_S)
    found = psutil.net_if_addrs()
    names = [name for name, addresses in found.items() if own in (one.address.split("%")[0] for one in addresses)]
    # 127.0.0.2 and so on are of this interface too, and not listed.
    return names[0] if names else ("lo" if own.startswith("127.") and "lo" in found else None)


def describe(topology: Topology, environment: Mapping[str, str], interface: str | None, backend: str) -> str:
    """A block of lines for the beginning of a run's output.

    Args:
        topology: of the first rank.
        environment: after what is missing was set.
        interface: see `interface_to`.
        backend: ``nccl`` or ``gloo``.
    """
    nodes = topology.num_nodes
    on = f" on {nodes} node{'s' if nodes > 1 else ''}" if nodes else ""
    set_names = [f"{name}={environment[name]}" for name in _INTERFACE_NAMES if name in environment]
    return "\n".join(
        [
            f"ranks     {topology.num_ranks}{on}, as found in the variables of {_WHOSE[topology.found_in]}",
            f"meet at   {topology.address}:{topology.port} through {interface or 'an unknown interface'}",
            f"backend   {backend}{', ' if set_names else ''}{', '.join(set_names)}",
        ]
    )


_INTERFACE_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_WHOSE = {"launcher": "the launcher", "Slurm": "Slurm", "alone": "none"}


def take_place(timeout_s: float, backend: str) -> Topology:
    """Finds the place of this process and sets the variables that torch reads; the first of several ranks prints it.

    GLOO_SOCKET_IFNAME is set where it is not: gloo otherwise takes the address of the machine's own name, which on
    Debian and Ubuntu is 127.0.1.1 and in containers often none, and which no other machine reaches. NCCL chooses well
    by itself (InfiniBand first), so NCCL_SOCKET_IFNAME is left as it is.

    Args:
        timeout_s: longest wait for the address of the first rank's machine.
        backend: ``nccl`` or ``gloo``.

    Raises:
        ConfigError: see `find_topology`.
        RankError: see `interface_to`.
    """
    topology = find_topology(os.environ)
    os.environ.update(topology.environment())
    if topology.address and topology.num_ranks > 1:
        interface = interface_to(topology.address, timeout_s)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if topology.rank == 0:
            print(describe(topology, os.environ, interface, backend), file=sys.stderr, flush=True)
    return topology
