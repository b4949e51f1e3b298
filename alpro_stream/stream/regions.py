"""Parts of an open file as arrays: what processes of one run share; imports no torch, which takes seconds to load."""

import mmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Region(NamedTuple):
    """A part of an open file: where it begins, a multiple of the page size, and its size in bytes."""

    offset: int
    size: int


def map_region(descriptor: int, region: Region) -> NDArray[np.uint8]:
    """The bytes of a region, shared with whoever maps it too; of no file (-1) fresh memory that nobody else has."""
    offset = region.offset if descriptor >= 0 else 0
    return np.frombuffer(mmap.mmap(descriptor, region.size, offset=offset), np.uint8)
