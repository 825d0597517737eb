"""How much memory is left, and a clear refusal before a data set that does not fit."""

from __future__ import annotations

import os
from pathlib import Path

from pdarts_fast.errors import RunError

_GIB = 1024**3
# Files of a control group (version 2, then 1): its limit, what it uses now, and its statistics
# with the name of the part of that use that is file cache the kernel gives back on demand.
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_CGROUP_ROOT = "/sys/fs/cgroup"


def available_memory() -> int | None:
    """Bytes a process can still allocate, or None where the platform does not tell.

    Linux: the smaller of ``MemAvailable`` and what the control group (a container's limit)
    leaves. Elsewhere: the physical memory, an upper bound.
    """
    found: list[int] = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit_file, usage_file, cache_key in _CGROUPS:
        limit = _read(f"{_CGROUP_ROOT}/{limit_file}").strip()
        usage = _read(f"{_CGROUP_ROOT}/{usage_file}").strip()
        if limit.isdigit() and usage.isdigit():
            statistics = _read(f"{_CGROUP_ROOT}/{limit_file.rpartition('.')[0]}.stat")
            values = dict(line.split() for line in statistics.splitlines())
            used = int(usage) - int(values.get(cache_key, 0))
            found.append(max(0, int(limit) - used))
    if not found and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def require_memory(name: str, num_images: int, image_size: int) -> None:
    """Refuses a data set whose uint8 images would not fit in memory.

    Args:
        name: the data set's name or folder, for the message.
        num_images: images of all splits.
        image_size: their side in pixels.

    Raises:
        RunError: ``num_images * 3 * image_size**2`` bytes are more than is available.
    """
    needed = num_images * 3 * image_size**2
    available = available_memory()
    if available is not None and needed > available:
        raise RunError(
            f"{name}: {num_images} images at --image-size {image_size} need {needed / _GIB:.1f} "
            f"GiB of memory but {available / _GIB:.1f} GiB are free: choose a smaller "
            f"--image-size or fewer images"
        )


def _read(path: str) -> str:
    """The text of a system file, empty where the platform has no such file."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
