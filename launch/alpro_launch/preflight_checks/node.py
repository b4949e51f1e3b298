"""What a machine gives to its ranks beside memory: shared memory, open files, cores."""

import os
import resource
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alpro_launch.preflight_checks.lines import Line, counted, gib, verdict_of_share

_SHARED_MEMORY = Path("/dev/shm")
# Sockets, libraries, logs, pipes to workers.
_OTHER_FILES = 256


@dataclass(frozen=True, slots=True)
class Node:
    """What a rank finds on its machine.

    Attributes:
        shm_bytes: free shared memory.
        max_files: that a process may have open.
        num_cores: that this process may use.
    """

    shm_bytes: int
    max_files: int
    num_cores: float


def look_at_node() -> Node:
    """Of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm_bytes = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
    return Node(shm_bytes, 2**31 if soft == resource.RLIM_INFINITY else soft, _num_cores())


def judge_nodes(
    found: Sequence[Node],
    nodes: Sequence[Sequence[int]],
    hosts: Sequence[str],
    *,
    shm_bytes: int,
    num_files: int,
    num_workers: int,
) -> list[Line]:
    """A line for each of the three, of the machine that has least of it.

    Args:
        found: by rank.
        nodes: ranks of each machine.
        hosts: by rank.
        shm_bytes: of shared memory, that a rank needs.
        num_files: shards that a rank has open at the same time.
        num_workers: processes or threads of a rank that decode.
    """
    least_shm = max(nodes, key=lambda ranks: len(ranks) * shm_bytes / max(1, found[ranks[0]].shm_bytes))
    least_files = min(range(len(found)), key=lambda rank: found[rank].max_files)
    least_cores = min(nodes, key=lambda ranks: found[ranks[0]].num_cores / len(ranks))
    return [
        _shared_memory(found[least_shm[0]], len(least_shm), shm_bytes, hosts[least_shm[0]]),
        _open_files(found[least_files], num_files, hosts[least_files]),
        _cores(found[least_cores[0]], len(least_cores), num_workers, hosts[least_cores[0]]),
    ]


def _shared_memory(node: Node, num_ranks: int, num_bytes: int, host: str) -> Line:
    need = num_ranks * num_bytes
    text, against = (
        f"{gib(node.shm_bytes)} free in {_SHARED_MEMORY} on {host}",
        f"{gib(need)} for {counted(num_ranks, 'rank')}",
    )
    verdict = verdict_of_share(need / node.shm_bytes) if node.shm_bytes else "FAIL" if need else "ok"
    remedy = "" if verdict == "ok" else "give the container more (--shm-size, an emptyDir with medium: Memory)"
    return Line("shared memory", text, against, verdict, remedy)


def _open_files(node: Node, num_files: int, host: str) -> Line:
    text, against = f"{node.max_files} a process on {host}", f"{num_files} shards and about {_OTHER_FILES} others"
    remedy = "raise the limit (`ulimit -n`), or use a smaller stream.window_shards"
    if node.max_files < num_files:
        return Line("open files", text, against, "FAIL", remedy)
    if node.max_files < num_files + _OTHER_FILES:
        return Line("open files", text, against, "warn", remedy)
    return Line("open files", text, against)


def _cores(node: Node, num_ranks: int, num_workers: int, host: str) -> Line:
    need = num_ranks * (1 + num_workers)
    text = f"{node.num_cores:g} on {host}"
    against = f"{counted(num_ranks, 'rank')} with {counted(num_workers, 'decoding worker')} each"
    if node.num_cores >= need:
        return Line("cores", text, against)
    remedy = f"they share them; {need} would give each its own: ask for more, or lower stream.decode.num_workers"
    return Line("cores", text, against, "warn", remedy)


def _num_cores() -> float:
    """Those that the scheduler may use, or what the control group allows if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # No such file, or "max".
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, int(quota) / int(period))
    return cores
