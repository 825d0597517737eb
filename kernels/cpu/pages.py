"""Huge pages: whether there are any, and some for small objects.

Every weight has its tensors, nodes of autograd and Python objects, on some page among those of the
whole program. The kernels read and write about a gigabyte between two uses of them, so that even
where a page lies has to be looked up in main memory, in tables of several levels: on a virtual
machine 40 µs a weight and pass, 6 to 10 % of stage 3 at batch 32. On a few huge pages little has to
be looked up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HUGE_PAGE = 1 << 21
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPPINGS = Path("/proc/self/smaps")
# Of <sys/mman.h>, since Linux 6.1: makes huge pages of what is there, now.
_COLLAPSE = 25
# Small objects are not in larger mappings than this; to move those takes long.
_LARGEST = 1 << 30
# Empty pages of a mapping would need memory.
_FULL = 0.75


def are_offered() -> bool:
    """Whether the system gives huge pages to programs that ask for them (Linux)."""
    return _SETTING.exists() and "[never]" not in _SETTING.read_text()


@dataclass
class _Mapping:
    """A part of this process's memory, in bytes."""

    begin: int
    end: int
    private: bool
    resident: int = 0
    huge: int = 0

    def is_worth_it(self) -> bool:
        """Whether it is full of small pages."""
        size = self.end - self.begin
        full = self.resident >= _FULL * size and self.huge < _FULL * self.resident
        return self.private and full and HUGE_PAGE <= size <= _LARGEST


def _mappings() -> Iterator[_Mapping]:
    mapping = None
    for line in _MAPPINGS.read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            if mapping:
                yield mapping
            begin, end = (int(x, 16) for x in name.split("-"))
            # Written by this process alone, and no file: the heap or nameless.
            mapping = _Mapping(begin, end, rest[0] == "rw-p" and rest[4:] in ([], ["[heap]"]))
        elif mapping and name == "Rss:":
            mapping.resident = int(rest[0]) << 10
        elif mapping and name == "AnonHugePages:":
            mapping.huge = int(rest[0]) << 10
    if mapping:
        yield mapping


def collapse_small_pages() -> int:
    """Makes huge pages of what this process has on small ones, as far as the system does that.

    Linux from 6.1 on, unless huge pages are switched off; elsewhere nothing happens. It takes a
    second or two for 300 MB where the host of a virtual machine has to find the memory.

    Returns:
        Bytes of the mappings that are now on huge pages.
    """
    if not (are_offered() and _MAPPINGS.exists()):
        return 0
    madvise = ctypes.CDLL(None).madvise
    total = 0
    for mapping in [m for m in _mappings() if m.is_worth_it()]:
        begin = -(-mapping.begin // HUGE_PAGE) * HUGE_PAGE
        size = mapping.end // HUGE_PAGE * HUGE_PAGE - begin
        if size > 0 and madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _COLLAPSE) == 0:
            total += size
    return total
