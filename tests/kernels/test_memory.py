"""The memory that the kernels' large arrays lie on."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels.cpu.memory import Pool

MIB = 1 << 20
HUGE_PAGE = 2 * MIB


def take(pool: Pool, mebibytes: int) -> Tensor:
    return pool.empty((mebibytes * MIB,), torch.uint8)


def test_memory_goes_back_to_the_pool() -> None:
    pool = Pool()
    shape = (1 << 20,)
    tensor = pool.empty(shape, torch.float32)
    address = tensor.data_ptr()
    view = tensor.view(2, -1)[1]
    del tensor
    assert (pool.in_use, pool.free) == (1 << 22, 0)
    del view
    gc.collect()
    assert (pool.in_use, pool.free) == (0, 1 << 22)
    assert pool.empty(shape, torch.float32).data_ptr() == address


def test_steps_of_two_dtypes_in_turns_find_their_memory() -> None:
    pool = Pool()
    addresses = [[take(pool, size).data_ptr() for size in (32, 6, 16, 4)] for _ in range(3)]
    assert addresses[0] == addresses[1] == addresses[2]


def test_memory_is_handed_back_where_there_is_too_much() -> None:
    pool = Pool()
    for size in (10, 8, 6):
        take(pool, size)
    # Twice what was in use at a time: the first one has to go.
    assert pool.free == 14 * MIB
    kept = take(pool, 40)
    assert (pool.in_use, pool.free) == (kept.nbytes, 14 * MIB)
    more = take(pool, 30)
    assert (pool.in_use, pool.free) == (kept.nbytes + more.nbytes, 14 * MIB)


def test_stale_memory_is_handed_back() -> None:
    pool = Pool()
    take(pool, 16)
    kept = take(pool, 32)
    for _ in range(9000):
        take(pool, 2)
    assert (pool.in_use, pool.free) == (kept.nbytes, 2 * MIB)


def mapping_flags(address: int) -> list[str]:
    """What the system knows about the memory that an address is part of."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "VmFlags:":
            return rest
    raise LookupError(hex(address))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for")
def test_memory_is_of_huge_pages() -> None:
    tensor = take(Pool(), 5)
    flags = mapping_flags(tensor.data_ptr())
    # Advised to be of huge pages; shared memory does not get them.
    assert "hg" in flags
    assert "sh" not in flags
    assert tensor.data_ptr() % HUGE_PAGE == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes by fork")
def test_processes_have_their_own_memory() -> None:
    pool = Pool()
    kept = take(pool, 4)
    kept[0] = 1
    address = take(pool, 8).data_ptr()
    child = os.fork()
    if child == 0:
        # One number each: threads that would share an array out are the parent's.
        took = take(pool, 8)
        took[0] = kept[0] = 2
        # What lay free is the parent's: were it kept, it would be copied when either writes to it.
        os._exit(0 if pool.free == 0 else 1)
    fresh = take(pool, 8)
    fresh[0] = 3
    assert fresh.data_ptr() == address
    assert os.waitpid(child, 0)[1] == 0
    assert (kept[0], fresh[0]) == (1, 3)
