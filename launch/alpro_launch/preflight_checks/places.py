"""Which ranks share a machine, and through which interface a machine reaches the first rank."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from alpro_launch.topology import interface_to

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    Attributes:
        host: name of its machine, or container.
        machine: equal for two ranks exactly where they share that.
    """

    host: str
    machine: str

    @classmethod
    def here(cls) -> "Place":
        """Of this process; a name alone may be that of all machines, such as ``localhost``."""
        host = socket.gethostname()
        return cls(host, f"{host} {_BOOT_ID.read_text() if _BOOT_ID.is_file() else ''}")


def nodes_of(places: Sequence[Place]) -> list[list[int]]:
    """The ranks of each machine, in order; the first of each speaks for it."""
    nodes: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(place.machine, []).append(rank)
    return list(nodes.values())


def link_to(address: str) -> tuple[str, float | None]:
    """The interface of this machine through which an address is reached, and its speed.

    Returns:
        Its name, and GB/s; None where the kernel knows none, as of loopback and most virtual ones.
    """
    name = interface_to(address, _PATIENCE_S) or "an unknown interface"
    found = psutil.net_if_stats().get(name)
    return name, found.speed / 8000 if found and found.speed else None
