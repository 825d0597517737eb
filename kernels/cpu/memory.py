"""Reuses large arrays from step to step.

Fresh memory costs a page fault per 4 KiB: for the arrays of a cell about as long as it takes to
fill them. A block goes back to the pool when the last tensor on it is freed. Blocks are whole
huge pages, which save 11 to 17 % of a pass: the processor remembers where few pages are, and what
it does not remember it looks up in tables of several levels, twice as many in a virtual machine.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

from . import pages
from .pages import HUGE_PAGE

# Below this the C library's allocator reuses memory by itself.
_SMALLEST = 1 << 18
# Blocks in use and free ones together stay below this many times what was ever in use: steps in
# float32 and in bfloat16, in turns, both find theirs.
_SPARE = 2.0
# Blocks that lay free while so many others were taken are handed back: some ten steps of a search.
_PATIENCE = 4096


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _fresh(size: int) -> np.ndarray:
    """A block of the system's, ``uint8 [size]``, of huge pages where it has them.

    The kernel gives those to private memory alone, and only to whole ones. Memory that is not
    private, Python's default, would also be one for a process and those forked from it.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pages.are_offered():
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = np.frombuffer(memory, dtype=np.uint8)
    begin = -block.ctypes.data % HUGE_PAGE
    return block[begin : begin + size]


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """Free blocks of memory by size.

    Attributes:
        in_use: Bytes of blocks that tensors lie on.
        free: Bytes of blocks that wait.
    """

    def __init__(self) -> None:
        # By size, with when they came back, the last one last. Appending to and popping from a
        # deque is atomic: finalizers may run at any moment.
        self._blocks: defaultdict[int, deque[tuple[int, np.ndarray]]] = defaultdict(deque)
        self.in_use = 0
        self.free = 0
        self._peak = 0
        self._taken = 0
        self._lock = threading.Lock()
        _pools.add(self)

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            return self._take_alone(size)

    def _take_alone(self, size: int) -> np.ndarray:
        self._taken += 1
        if self._taken % _PATIENCE == 0:
            while self._oldest()[0] < self._taken - _PATIENCE:
                self._forget_oldest()
        try:
            _, block = self._blocks[size].pop()
            self.free -= size
        except IndexError:
            limit = _SPARE * max(self._peak, self.in_use + size)
            while self.free and self.in_use + self.free + size > limit:
                self._forget_oldest()
            block = _fresh(size)
        self.in_use += size
        self._peak = max(self._peak, self.in_use)
        return block

    def _oldest(self) -> tuple[float, int]:
        """When the block that is free for longest came back, and its size; infinity if none is."""
        waiting = [(blocks[0][0], size) for size, blocks in list(self._blocks.items()) if blocks]
        return min(waiting, default=(math.inf, 0))

    def _forget_oldest(self) -> None:
        size = self._oldest()[1]
        self._blocks[size].popleft()
        self.free -= size

    def _give_back(self, size: int, block: np.ndarray) -> None:
        self.in_use -= size
        self.free += size
        self._blocks[size].append((self._taken, block))

    def clear(self) -> None:
        """Hands every free block back to the system."""
        self._blocks.clear()
        self.free = 0
        self._peak = self.in_use

    def leave_to_parent(self) -> None:
        """Forgets what lies free, in a forked process: the parent would pay for copies of it."""
        self._lock = threading.Lock()
        self.clear()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor in main memory."""
        count = math.prod(shape)
        needed = count * dtype.itemsize
        if needed < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        size = -(-needed // HUGE_PAGE) * HUGE_PAGE
        block = self._take(size)
        array = block[:needed]
        weakref.finalize(array, self._give_back, size, block).atexit = False
        # Not a view: autograd adds to gradients in place only where nothing else holds them.
        tensor = torch.frombuffer(array, dtype=dtype, count=count)
        return tensor.as_strided_(shape, _strides(shape))


def _leave_to_parent() -> None:
    for pool in _pools:
        pool.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)

pool = Pool()
