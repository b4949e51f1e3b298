"""What the links between ranks carry, as the sums of gradients use them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from alpro_launch.preflight_checks.lines import Line
from alpro_launch.preflight_checks.places import link_to
from alpro_stream.train.distributed import World

# About what a bucket of gradients has on either, and large enough that latency does not count.
_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_ROUNDS, _SMALL_ROUNDS = 3, 20
# Of a link that data go through once. Through a machine's own memory they go several times, in the time of processes
# that share its cores.
_LEAST_OF_LINK, _LEAST_OF_COPY = 0.5, 0.02


@dataclass(frozen=True, slots=True)
class Links:
    """What a rank measured; bandwidths in GB/s (10**9 bytes), None where there is nobody to share a link with.

    Attributes:
        inside: bus bandwidth among the ranks of the machine.
        between: bus bandwidth among the first ranks of the machines; None on the others.
        latency_s: of the sum of one number over all ranks.
        copy: of memory, in the same size.
        interface: towards the master's address.
        interface_speed: in GB/s; None where it is not known.
        on_gpu: whether the sums are of GPUs.
    """

    inside: float | None
    between: float | None
    latency_s: float
    copy: float
    interface: str
    interface_speed: float | None
    on_gpu: bool


def bus_bandwidth(num_bytes: int, seconds: float, num_ranks: int) -> float:
    """GB/s that an all-reduce asks of each link: 2 (n - 1) / n of the bytes, as nccl-tests defines it.

    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds / 1e9


def measure_links(world: World, nodes: Sequence[Sequence[int]], master: str) -> Links:
    """Sums inside each machine at the same time, then between the first ranks of the machines; on all ranks.

    Args:
        world: at least two ranks.
        nodes: ranks of each machine.
        master: address of the first rank.
    """
    timeout = timedelta(seconds=world.timeout_s)
    # Every rank makes all groups, in the same order.
    groups = [dist.new_group(list(ranks), timeout=timeout) for ranks in nodes]
    leaders = [ranks[0] for ranks in nodes]
    leading = dist.new_group(leaders, timeout=timeout)
    numbers = torch.zeros(_BYTES[world.device.type] // 4, device=world.device)
    with world.waiting("the sums of gradients of all ranks"):
        own, group = next((ranks, g) for ranks, g in zip(nodes, groups, strict=True) if world.rank in ranks)
        latency_s = _all_reduce_s(world, numbers[:1], None, _SMALL_ROUNDS)
        inside = between = None
        if len(own) > 1:
            inside = bus_bandwidth(numbers.nbytes, _all_reduce_s(world, numbers, group, _ROUNDS), len(own))
        world.barrier()
        if len(leaders) > 1 and world.rank in leaders:
            between = bus_bandwidth(numbers.nbytes, _all_reduce_s(world, numbers, leading, _ROUNDS), len(leaders))
    if world.device.type == "cuda":  # It is to be counted as free again.
        del numbers
        torch.cuda.empty_cache()
    return Links(inside, between, latency_s, _copy(), *link_to(master), world.device.type == "cuda")


def judge_links(found: Sequence[Links], num_nodes: int) -> list[Line]:
    """A line for each kind of link, of the slowest."""
    inside = min((links for links in found if links.inside is not None), key=lambda one: one.inside or 0, default=None)
    between = min(
        (links for links in found if links.between is not None), key=lambda one: one.between or 0, default=None
    )
    latency = Line("latency", f"{1e6 * max(one.latency_s for one in found):.0f} us", "sum of one number over all ranks")
    lines = []
    if inside is not None and inside.inside is not None:
        lines.append(_bandwidth(f"sums in a node{_slowest(num_nodes)}", inside.inside, *_limit_inside(inside)))
    if between is not None and between.between is not None:
        lines.append(_bandwidth("sums between nodes", between.between, *_limit_between(between)))
    return [*lines, latency]


def _slowest(num_nodes: int) -> str:
    return " (the slowest)" if num_nodes > 1 else ""


def _limit_inside(links: Links) -> tuple[float | None, str, float]:
    if links.on_gpu:  # What NVLink or PCIe should give is nowhere to be read.
        return None, "unknown between GPUs of a node", 0
    return links.copy, "copy in memory", _LEAST_OF_COPY


def _limit_between(links: Links) -> tuple[float | None, str, float]:
    if links.interface_speed is not None:
        return links.interface_speed, f"speed of {links.interface}", _LEAST_OF_LINK
    return links.copy, f"{links.interface} has no speed; copy in memory", _LEAST_OF_COPY


def _bandwidth(check: str, found: float, limit: float | None, what: str, least: float) -> Line:
    """Judges a bus bandwidth against a share of what there should be."""
    text = f"{found:.2f} GB/s bus bandwidth"
    if limit is None:
        return Line(check, text, what)
    against = f"{limit:.2f} GB/s, {what}"
    if found >= least * limit:
        return Line(check, text, against)
    remedy = (
        f"less than {100 * least:.0f} % of it: see that the ranks use the fast interface (NCCL_SOCKET_IFNAME, "
        "GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says which), and that nothing else does"
    )
    return Line(check, text, against, "warn", remedy, "hardware")


def _all_reduce_s(world: World, tensor: torch.Tensor, group: dist.ProcessGroup | None, rounds: int) -> float:
    """Seconds of one, the median after one that sets the connections up."""
    times = []
    for _ in range(rounds + 1):
        _synchronise(world)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _synchronise(world)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _copy() -> float:
    """GB/s of a copy in the memory of the CPU."""
    source = torch.zeros(_BYTES["cpu"] // 4)
    target = torch.empty_like(source)
    times = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return source.nbytes / median(times[1:]) / 1e9


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
