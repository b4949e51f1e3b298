"""Memory for pixels that is used again and again, and that other processes can have too.

Fresh memory costs a page fault for every 4 KiB, which the kernel fills with zeros first: a tenth of what decoding into
it takes.
"""

import os
import weakref
from collections import defaultdict
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpro_stream.stream.regions import Region, map_region

_SMALLEST_BYTES = 1 << 16


class ReusedMemory:
    """Tensors of bytes; what one took is free again when its last view is gone.

    To be called by one thread at a time, and not after a fork; tensors may be dropped by any thread.

    Attributes:
        descriptor: of the file that they lie in, -1 where there is none.

    Args:
        shared: whether other processes are to have them: they lie in an open file then (Linux). It has no name: nothing
            is left behind by a process that is killed, and containers with little ``/dev/shm`` do as well.
    """

    def __init__(self, *, shared: bool) -> None:
        self._is_shared = shared
        self.descriptor = os.memfd_create("alpro-pixels") if shared else -1
        self._close = weakref.finalize(self, os.close, self.descriptor) if shared else None
        self._size = 0
        self._free: defaultdict[int, list[Region]] = defaultdict(list)
        self._mapped: dict[Region, NDArray[np.uint8]] = {}

    def empty(self, shape: Sequence[int]) -> Tensor:
        """A tensor of bytes, uint8, with anything in it.

        Raises:
            RuntimeError: the memory is closed.
        """
        num_bytes = prod(shape)
        # Sizes of a power of two, so that batches of nearly one size share regions. What is never written takes none.
        size = max(_SMALLEST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        region = self._free[size].pop() if self._free[size] else self._grow(size)
        # The tensor holds this very array, and so do its views; views of the array would not.
        array = self._mapped[region][:num_bytes]
        weakref.finalize(array, self._free[size].append, region).atexit = False
        return torch.from_numpy(array).view(*shape)

    def place_of(self, tensor: Tensor) -> tuple[Region, int]:
        """The region that a tensor, or part of one, lies in, and at which byte of it.

        Raises:
            ValueError: it is none of `empty`, or not contiguous.
        """
        address = tensor.data_ptr()
        for region, mapped in self._mapped.items():
            start = address - mapped.ctypes.data
            if start >= 0 and start + tensor.nbytes <= region.size and tensor.is_contiguous():
                return region, start
        raise ValueError("a worker writes into memory of its decoder's `empty` alone, and into rows that follow")

    def close(self) -> None:
        """Closes the file and forgets the memory; tensors stay as they are."""
        if self._close is not None:
            self._close()
            self.descriptor = -1
        self._free.clear()
        self._mapped.clear()

    def _grow(self, size: int) -> Region:
        if self._is_shared and self.descriptor < 0:
            raise RuntimeError("the memory of this decoder is closed")
        region = Region(self._size, size)
        self._size += size
        if self.descriptor >= 0:
            os.ftruncate(self.descriptor, self._size)
        self._mapped[region] = map_region(self.descriptor, region)
        return region
