"""The doctor command: what is installed, what this machine has, what can run and why not."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pdarts_fast.data import load_dataset
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.run.directory import free_gib
from pdarts_fast.run.environment import cpu_name, memory_gib, usable_cores, versions

COMPILERS = ("c++", "g++", "clang++")


def examine(data: Path | None, dataset: str, checksum: bool, kernels: bool = False) -> int:
    """Print a table of checks.

    Args:
        data: Folder of the data set to check; None for one that needs none.
        dataset: Its name.
        checksum: Whether to verify the MD5 of CIFAR files.
        kernels: Whether to check the Triton kernels on every GPU.

    Returns:
        0, or 1 if the data set cannot be used or a kernel is wrong.
    """
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in versions().items()))
    table.add_row(
        "cpu",
        f"{cpu_name()}; {usable_cores()} cores; {memory_gib():.1f} GiB; "
        f"{torch.backends.cpu.get_cpu_capability()}",
    )
    table.add_row("cpu features", ", ".join(_cpu_features()) or "unknown")
    table.add_row("gpu", _gpu())
    for package in ("triton", "nvidia.dali"):
        table.add_row(package, _importable(package))
    table.add_row("compiler", _compiler())
    for name, found in backends.available().items():
        table.add_row(f"backend {name}", f"{'yes' if found.usable else 'no'}: {found.reason}")
    table.add_row("disk", f"{free_gib(Path('runs')):.1f} GiB free for runs/")
    failed, text = _data(data, dataset, checksum)
    table.add_row(f"data {dataset}", text)
    wrong = False
    for label, good, text in _kernels() if kernels else []:
        table.add_row(label, text)
        wrong |= not good
    Console(highlight=False).print(table)
    return int(failed or wrong)


def _kernels() -> list[tuple[str, bool, str]]:
    """Label, whether nothing is wrong, and findings of the Triton kernels on every GPU."""
    found = backends.available()["triton"]
    if not found.usable:
        return [("kernels", True, f"not checked: {found.reason}")]
    from pdarts_fast.kernels.triton import self_check

    rows = []
    for index in range(torch.cuda.device_count()):
        findings = self_check.check(torch.device("cuda", index))
        bad = [one for one in findings if not one.is_good]
        lines = [
            f"{one.primitive} ({one.storage}, {one.array}): "
            f"{one.failure or f'{one.error:.1e} off, {one.tolerance:.0e} allowed'}"
            for one in bad
        ]
        summary = f"{len(findings) - len(bad)} of {len(findings)} checks passed"
        rows.append((f"kernels gpu {index}", not bad, "\n".join([summary, *lines])))
    return rows


def _cpu_features() -> list[str]:
    """Vector extensions of an x86-64 or arm64 processor that kernels can use."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    words = set(info.read_text().split())
    wanted = [
        "avx2",
        "fma",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "amx_bf16",
        "amx_tile",
        "asimd",
        "sve",
        "bf16",
    ]
    return [name for name in wanted if name in words]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB)"
        )
    return "; ".join(names)


def _importable(name: str) -> str:
    try:
        module = importlib.import_module(name)
    # A package whose libraries are missing or of another version may raise anything.
    except Exception as error:
        return f"no: {' '.join(str(error).split())}"
    return f"yes: {getattr(module, '__version__', 'version unknown')}"


def _compiler() -> str:
    found = [path for name in COMPILERS if (path := shutil.which(name))]
    return f"yes: {found[0]}" if found else f"no: none of {', '.join(COMPILERS)} on PATH"


def _data(folder: Path | None, name: str, checksum: bool) -> tuple[bool, str]:
    try:
        found = load_dataset(name, folder, checksum=checksum)
    except (UsageError, RunError) as error:
        return True, f"no: {error}"
    return False, f"yes: {len(found.train)} training and {len(found.test)} test images"
