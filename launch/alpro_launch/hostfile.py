"""Hostfiles, as deepspeed and MPI read them: a line for each machine, ``HOST slots=RANKS``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpro_stream.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(?:\s*#.*)?")
_EXPECTED = "expected `HOST slots=NUMBER`, such as `node1 slots=8`"


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes, one a GPU."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The machines of a hostfile, in its order.

    Raises:
        ConfigError: it cannot be read; a line is none, names no rank, or names a machine for the second time.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the hostfile {path} cannot be read: {error}; {_EXPECTED} in each line") from error
    line_of: dict[str, int] = {}
    hosts = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where, match = f"{path}, line {number}: found {line!r}", _LINE.fullmatch(line)
        if not match:
            raise ConfigError(f"{where}, {_EXPECTED}")
        name, slots = match[1], int(match[2])
        if not slots:
            raise ConfigError(f"{where}, expected at least one slot; put # before the line to leave {name} out")
        if name in line_of:
            raise ConfigError(f"{where}, but {name} is in line {line_of[name]} already; expected each host once")
        line_of[name] = number
        hosts.append(Host(name, slots))
    if not hosts:
        raise ConfigError(f"{path}: found no host, {_EXPECTED}")
    return hosts


def num_slots(hosts: Sequence[Host]) -> int:
    """Ranks that the machines take together."""
    return sum(host.slots for host in hosts)


def taken(hosts: Sequence[Host], num_ranks: int) -> list[Host]:
    """The first machines that take so many ranks, the last of them perhaps fewer than it could."""
    chosen: list[Host] = []
    for host in hosts:
        left = num_ranks - num_slots(chosen)
        if left > 0:
            chosen.append(Host(host.name, min(host.slots, left)))
    return chosen


def to_text(hosts: Sequence[Host]) -> str:
    """The hostfile of them."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
