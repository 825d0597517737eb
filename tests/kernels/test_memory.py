"""The memory that the kernels' large arrays lie on."""

from __future__ import annotations

import gc
import mmap
import os
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels.cpu import pages
from pdarts_fast.kernels.cpu.memory import Pool

MIB = 1 << 20


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


def mapping(address: int, name: str) -> list[str]:
    """What the system knows, under a name, about the memory that an address is part of."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == f"{name}:":
            return rest
    raise LookupError(hex(address))


@pytest.mark.skipif(not pages.are_offered(), reason="no huge pages to ask for")
def test_memory_is_of_huge_pages() -> None:
    tensor = take(Pool(), 5)
    flags = mapping(tensor.data_ptr(), "VmFlags")
    # Advised to be of huge pages; shared memory does not get them.
    assert "hg" in flags
    assert "sh" not in flags
    assert tensor.data_ptr() % pages.HUGE_PAGE == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes by fork")
def test_processes_have_their_own_memory() -> None:
    pool = Pool()
    kept = take(pool, 4)
    kept[0] = 1
    address = take(pool, 8).data_ptr()
    child = os.fork()
    if child == 0:
        # One number each: threads that would share an array out are the parent's.
        status = 1
        try:
            took = take(pool, 8)
            took[0] = kept[0] = 2
            # What lay free is the parent's: were it kept, it would be copied when either writes.
            status = int(pool.free != 0)
        finally:
            os._exit(status)
    fresh = take(pool, 8)
    fresh[0] = 3
    assert fresh.data_ptr() == address
    assert os.waitpid(child, 0)[1] == 0
    assert (kept[0], fresh[0]) == (1, 3)


def has_collapse() -> bool:
    """Whether the system makes huge pages of small ones when it is asked to."""
    if not pages.are_offered():
        return False
    return tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 1)


@pytest.mark.skipif(not has_collapse(), reason="needs Linux 6.1 with huge pages")
def test_small_pages_become_huge_ones_and_keep_what_they_have() -> None:
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    tensor.copy_(torch.arange(8 * MIB) % 251)
    assert pages.collapse_small_pages() >= 6 * MIB
    assert int(mapping(tensor.data_ptr(), "AnonHugePages")[0]) >= 6 * 1024
    assert bool((tensor == torch.arange(8 * MIB) % 251).all())


def test_sparse_shared_and_file_memory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listing = tmp_path / "smaps"
    mappings = [
        ("10000000-10400000 rw-p 00000000 00:00 0 [heap]", 4096, 0),
        ("20000000-20400000 rw-p 00000000 00:00 0", 4096, 0),
        ("30000000-30400000 rw-p 00000000 00:00 0", 1024, 0),  # mostly empty
        ("40000000-40400000 rw-p 00000000 00:00 0", 4096, 4096),  # huge already
        ("50000000-50400000 rw-s 00000000 00:00 0", 4096, 0),  # shared
        ("60000000-60400000 rw-p 00000000 08:01 7 /lib/x.so", 4096, 0),
        ("70000000-70100000 rw-p 00000000 00:00 0", 1024, 0),  # small
    ]
    listing.write_text(
        "".join(
            f"{head}\nRss: {resident} kB\nAnonHugePages: {huge} kB\nVmFlags: rd wr\n"
            for head, resident, huge in mappings
        )
    )
    monkeypatch.setattr(pages, "_MAPPINGS", listing)
    found = [m.begin for m in pages._mappings() if m.is_worth_it()]
    assert found == [0x10000000, 0x20000000]


@pytest.mark.parametrize("setting", [None, "always madvise [never]\n"], ids=["none", "never"])
def test_systems_without_huge_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None
) -> None:
    path = tmp_path / "enabled"
    if setting:
        path.write_text(setting)
    monkeypatch.setattr(pages, "_SETTING", path)
    assert pages.collapse_small_pages() == 0
    tensor = take(Pool(), 4)
    tensor[-1] = 1
    if Path("/proc/self/smaps").exists():
        assert "hg" not in mapping(tensor.data_ptr(), "VmFlags")
