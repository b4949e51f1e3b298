"""Slurm's short form of node lists: ``gpu[001-003,7],login1``."""

import re
from collections.abc import Iterator
from itertools import product

from alpro_stream.errors import ConfigError

# A name is text and brackets in turn; a comma outside of brackets ends it.
_NAME = re.compile(r"(?:[^,\[\]]|\[[0-9,-]+\])+")
_PART = re.compile(r"\[([0-9,-]+)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_node_list(text: str) -> list[str]:
    """The names of a node list, in its order.

    Args:
        text: such as SLURM_JOB_NODELIST holds; digits keep their leading zeros, several brackets in a name multiply.

    Raises:
        ConfigError: it is none.
    """
    names = _NAME.findall(text)
    if not text or ",".join(names) != text:
        raise ConfigError(f"{text!r} is no list of nodes; expected one such as gpu[001-003,7],login1")
    return [node for name in names for node in _expand(name, text)]


def _expand(name: str, text: str) -> Iterator[str]:
    parts = [[word] if word else list(_numbers(numbers, text)) for numbers, word in _PART.findall(name)]
    return map("".join, product(*parts))


def _numbers(numbers: str, text: str) -> Iterator[str]:
    for one in numbers.split(","):
        match = _RANGE.fullmatch(one)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"{text!r} is no list of nodes: {one!r} is no number and no range such as 001-003")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
