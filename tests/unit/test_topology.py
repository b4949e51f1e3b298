"""The place of a rank, from the variables of launchers and of Slurm."""

import socket

import psutil
import pytest

from alpro_launch.local_ranks import Node, rank_environments
from alpro_launch.node_list import expand_node_list
from alpro_launch.topology import Topology, describe, find_topology, interface_to
from alpro_stream.errors import ConfigError, RankError
from alpro_stream.train import roll_call

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[001-002]",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
DEEPSPEED = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "CROSS_SIZE": "2",
    "LOCAL_SIZE": "8",
}


def test_without_variables_a_rank_is_alone():
    found = find_topology({"HOME": "/root", "LOCAL_RANK": "0"})
    assert found == Topology(0, 0, 1, 1, None, None, "alone")
    assert found.environment() == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def test_a_launcher_says_all():
    expected = Topology(9, 1, 16, 2, "10.0.0.1", 29500, "launcher")
    assert find_topology(DEEPSPEED) == expected
    torchrun = {name: value for name, value in DEEPSPEED.items() if name != "CROSS_SIZE"} | {"GROUP_WORLD_SIZE": "2"}
    assert find_topology(torchrun) == expected
    # Inside a job of Slurm too, where its own variables are those of the launcher's task.
    assert find_topology(DEEPSPEED | TASK) == expected
    assert find_topology({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).num_ranks == 1


def test_a_task_of_slurm():
    found = find_topology(TASK)
    assert found == Topology(9, 1, 16, 2, "gpu001", 15_000 + 4711, "Slurm")
    assert found.environment()["MASTER_ADDR"] == "gpu001"
    chosen = find_topology(TASK | {"MASTER_ADDR": "10.1.0.1", "MASTER_PORT": "7000"})
    assert (chosen.address, chosen.port) == ("10.1.0.1", 7000)
    # A task that sees its own GPU alone.
    assert find_topology(TASK | {"CUDA_VISIBLE_DEVICES": "3"}).local_rank == 0
    assert 15_000 <= find_topology(TASK | {"SLURM_JOB_ID": "123456789"}).port < 30_000


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "3"}, "RANK=3 without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: a launcher sets all"),
        (without(DEEPSPEED, "MASTER_PORT"), "MASTER_ADDR=10.0.0.1 without MASTER_PORT"),
        (DEEPSPEED | {"RANK": "16"}, "RANK=16 and WORLD_SIZE=16 contradict each other"),
        (DEEPSPEED | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=1 contradict each other"),
        (DEEPSPEED | {"MASTER_PORT": "tcp"}, "MASTER_PORT=tcp: expected a whole number"),
        (without(TASK, "SLURM_PROCID", "SLURM_JOB_ID"), "without SLURM_PROCID, SLURM_JOB_ID: srun sets all of them"),
        (TASK | {"SLURM_PROCID": "16"}, "SLURM_PROCID=16 and SLURM_NTASKS=16 contradict each other"),
        (TASK | {"SLURM_STEP_NODELIST": "gpu[1-"}, r"'gpu\[1-' is no list of nodes"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "batch script of a Slurm job with SLURM_NTASKS=4"),
    ],
)
def test_what_is_partial_or_contradictory_is_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        find_topology(environment)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[001-003,7],login1", ["gpu001", "gpu002", "gpu003", "gpu7", "login1"]),
        ("a-b[9-11].x,c", ["a-b9.x", "a-b10.x", "a-b11.x", "c"]),
        ("rack[1-2]n[08,10]", ["rack1n08", "rack1n10", "rack2n08", "rack2n10"]),
        ("n[3]", ["n3"]),
    ],
)
def test_node_lists(text, nodes):
    assert expand_node_list(text) == nodes


@pytest.mark.parametrize("text", ["", "a,,b", "a[", "a[]", "a[1-]", "a[3-1]", "a]b", ",a", "a[1,]"])
def test_what_is_no_node_list(text):
    with pytest.raises(ConfigError, match="is no list of nodes"):
        expand_node_list(text)


def test_the_ranks_of_one_node_among_several():
    ranks = rank_environments(2, Node(3, 1, "node0", 6000))
    found = [find_topology(environment) for environment in ranks]
    assert found == [Topology(2 + local, local, 6, 3, "node0", 6000, "launcher") for local in (0, 1)]
    with pytest.raises(ConfigError, match="--node-rank 3 of --nodes 3: nodes are numbered from 0 to 2"):
        Node(3, 3, "node0")
    with pytest.raises(ConfigError, match="--nodes 2 needs --master-addr"):
        Node(2, 0)


def test_the_interface_is_that_of_the_address():
    assert interface_to("127.0.0.1", 1) == "lo"
    assert interface_to("127.0.0.2", 1) == "lo"
    with pytest.raises(
        RankError, match=r"machine 'nowhere.invalid' cannot be reached from .*set --master-addr of alpro"
    ):
        interface_to("nowhere.invalid", 0.1)


def own_address():
    """One of this machine that is not of its loopback; None where there is none."""
    addresses = [
        one.address for found in psutil.net_if_addrs().values() for one in found if one.family == socket.AF_INET
    ]
    return next((address for address in addresses if not address.startswith("127.")), None)


@pytest.mark.skipif(own_address() is None, reason="this machine has a loopback alone")
def test_a_name_that_leads_to_the_machines_own_loopback_is_that_of_its_network(monkeypatch):
    """Debian has such a line in /etc/hosts for a machine's own name: no other machine reaches 127.0.1.1."""
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 1))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    # What leads to another machine, also where there is no way out.
    monkeypatch.setattr(roll_call, "_ANOTHER_MACHINE", (own_address(), 1))
    assert roll_call.own_host("node1") == own_address()
    # Who writes the address itself means it, as two hosts made on one machine do.
    assert roll_call.own_host("127.0.1.1").startswith("127.")
    assert roll_call.own_host("localhost").startswith("127.")
    assert interface_to("node1", 1) != "lo"


def test_a_name_that_comes_late_is_waited_for(monkeypatch, capsys):
    answers = iter([socket.gaierror("unknown"), "127.0.0.1"])

    def own_host(address):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("alpro_launch.topology.own_host", own_host)
    monkeypatch.setattr("alpro_launch.topology._RESOLVE_S", 0.01)
    assert interface_to("pod-0", 5) == "lo"
    assert "waiting for pod-0 to have an address (unknown)" in capsys.readouterr().err


def test_the_first_rank_describes_it():
    text = describe(find_topology(TASK | {"SLURM_PROCID": "0"}), {"GLOO_SOCKET_IFNAME": "eth0"}, "eth0", "nccl")
    assert text.splitlines() == [
        "ranks     16 on 2 nodes, as found in the variables of Slurm",
        "meet at   gpu001:19711 through eth0",
        "backend   nccl, GLOO_SOCKET_IFNAME=eth0",
    ]
