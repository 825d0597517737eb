"""Reuses large arrays from step to step.

Fresh memory costs a page fault per 4 KiB: for the arrays of a cell about as long as it takes to
fill them. A block goes back to the pool when the last tensor on it is freed.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

# Below this the C library's allocator reuses memory by itself.
_SMALLEST = 1 << 18
# Free blocks are kept while all blocks together stay below this many times what was ever in use:
# a backward pass frees what its forward pass holds and asks for few sizes of its own, so most
# of what is free half-way through a step is wanted again in the next one.
_SPARE = 1.5
# Blocks are multiples of a huge page, so that the kernel can back them with huge pages.
_GRANULE = 1 << 21


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


class Pool:
    """Free blocks of memory by size.

    Attributes:
        in_use: Bytes of blocks that tensors lie on.
        free: Bytes of blocks that wait.
    """

    def __init__(self) -> None:
        # Appending to and popping from a deque is atomic: finalizers may run at any moment.
        self._blocks: defaultdict[int, deque[mmap.mmap]] = defaultdict(deque)
        self.in_use = 0
        self.free = 0
        self._peak = 0

    def _take(self, size: int) -> mmap.mmap:
        try:
            block = self._blocks[size].pop()
            self.free -= size
        except IndexError:
            if self._is_stale(size):
                self.clear()
            block = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        self.in_use += size
        self._peak = max(self._peak, self.in_use)
        return block

    def _is_stale(self, size: int) -> bool:
        """Whether sizes have changed, as they do from stage to stage, so that none wait in vain."""
        if self.in_use == 0:
            return self.free > 0
        return self.in_use + self.free + size > _SPARE * self._peak

    def _give_back(self, size: int, block: mmap.mmap) -> None:
        self.in_use -= size
        self.free += size
        self._blocks[size].append(block)

    def clear(self) -> None:
        """Hands every free block back to the system."""
        self._blocks.clear()
        self.free = 0
        self._peak = self.in_use

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor in main memory."""
        count = math.prod(shape)
        needed = count * dtype.itemsize
        if needed < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        size = -(-needed // _GRANULE) * _GRANULE
        block = self._take(size)
        array = np.frombuffer(block, dtype=np.uint8, count=needed)
        weakref.finalize(array, self._give_back, size, block).atexit = False
        # Not a view: autograd adds to gradients in place only where nothing else holds them.
        tensor = torch.frombuffer(array, dtype=dtype, count=count)
        return tensor.as_strided_(shape, _strides(shape))


pool = Pool()
