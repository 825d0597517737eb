"""Finds and loads the compiled library, and chooses what this processor runs."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import abi

FILE_NAME = "_kernels.so"
PATH_VARIABLE = "PDARTS_FAST_KERNELS"
VARIANT_VARIABLE = "PDARTS_FAST_CPU_VARIANT"


class LibraryError(RuntimeError):
    """Why the compiled kernels cannot run here, in one line."""


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Attributes:
        path: Its file.
        handle: Its ctypes handle.
        index: Number of the variant in use.
        variant: Its name: ``amx``, ``avx512bf16``, ``avx512``, ``avx2`` or ``generic``.
        width: Floats in a vector of the variant.
    """

    path: Path
    handle: ctypes.CDLL
    index: int
    variant: str
    width: int

    def run(self, primitive: int, task: abi.Task) -> None:
        """Calls a primitive.

        Raises:
            RuntimeError: The library has no such primitive.
        """
        if self.handle.pdarts_run(self.index, primitive, ctypes.byref(task)):
            raise RuntimeError(f"{self.path} has no primitive {primitive} for {self.variant}")

    def run_cells(self, cells: int, count: int, *, backward: bool) -> None:
        """Runs a pass of cells that follow one another.

        Args:
            cells: Address of an array of ``abi.CellTask``.
            count: Its length.
            backward: From the last one on.

        Raises:
            RuntimeError: The library does not run here.
        """
        if self.handle.pdarts_run_cells(self.index, backward, cells, count):
            raise RuntimeError(f"{self.path} has no passes for {self.variant}")

    def draw(self, task: abi.DrawTask) -> None:
        """Draws masks.

        Raises:
            RuntimeError: The library does not run here.
        """
        if self.handle.pdarts_draw(self.index, ctypes.byref(task)):
            raise RuntimeError(f"{self.path} draws no masks for {self.variant}")

    def move_running(self, tasks: int, count: int) -> None:
        """Moves running statistics towards those of a batch.

        Args:
            tasks: Address of an array of ``abi.RunningTask``.
            count: Its length.
        """
        self.handle.pdarts_move_running(tasks, count)


def candidates() -> Iterator[Path]:
    """Where the library may lie, first choice first.

    A checkout's folder ``pdarts_fast`` hides the installed package, so installed copies are
    searched for along ``sys.path`` too.
    """
    named = os.environ.get(PATH_VARIABLE)
    if named:
        yield Path(named)
        return
    yield Path(__file__).resolve().parent / FILE_NAME
    for entry in sys.path:
        yield Path(entry or ".") / "pdarts_fast" / "kernels" / "cpu" / FILE_NAME


def _open(path: Path) -> ctypes.CDLL:
    # torch first: the library then shares its OpenMP runtime instead of loading another one.
    import torch  # noqa: F401

    try:
        handle = ctypes.CDLL(str(path))
        handle.pdarts_abi_version.restype = ctypes.c_int64
        version = handle.pdarts_abi_version()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} does not load: {error}") from error
    if version != abi.ABI_VERSION:
        raise LibraryError(
            f"{path} is of another version (interface {version}, wanted {abi.ABI_VERSION}); "
            "run `pip install .` again"
        )
    handle.pdarts_run.restype = ctypes.c_int64
    handle.pdarts_run.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(abi.Task))
    handle.pdarts_variant.restype = ctypes.c_char_p
    handle.pdarts_variant.argtypes = (
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_int64),
        ctypes.POINTER(ctypes.c_int64),
    )
    handle.pdarts_run_cells.restype = ctypes.c_int64
    handle.pdarts_run_cells.argtypes = (
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    handle.pdarts_draw.restype = ctypes.c_int64
    handle.pdarts_draw.argtypes = (ctypes.c_int64, ctypes.POINTER(abi.DrawTask))
    handle.pdarts_move_running.restype = None
    handle.pdarts_move_running.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    sizes = {
        "task": ctypes.sizeof(abi.Task),
        "branch": ctypes.sizeof(abi.Branch),
        "cell": ctypes.sizeof(abi.CellTask),
        "item": abi.ITEM.itemsize,
        "running": ctypes.sizeof(abi.RunningTask),
        "draw": ctypes.sizeof(abi.DrawTask),
    }
    for name, expected in sizes.items():
        size = getattr(handle, f"pdarts_sizeof_{name}")
        size.restype = ctypes.c_int64
        if size() != expected:
            raise LibraryError(f"{path}: struct {name} has {size()} bytes, not those of abi.py")
    return handle


def variants(handle: ctypes.CDLL) -> list[tuple[str, bool, int]]:
    """Name, whether this processor runs it, and vector width of every variant, best first."""
    found: list[tuple[str, bool, int]] = []
    runs, width = ctypes.c_int64(), ctypes.c_int64()
    while True:
        name = handle.pdarts_variant(len(found), ctypes.byref(runs), ctypes.byref(width))
        if name is None:
            return found
        found.append((name.decode(), bool(runs.value), width.value))


def load() -> Library:
    """The library with its best variant, or the one that ``PDARTS_FAST_CPU_VARIANT`` names.

    Raises:
        LibraryError: There is no library, or it does not run here.
    """
    path = next((path for path in candidates() if path.is_file()), None)
    if path is None:
        named = os.environ.get(PATH_VARIABLE)
        if named:
            raise LibraryError(f"{PATH_VARIABLE}={named}: no such file")
        raise LibraryError(
            "the C++ kernels are not built: install a C++17 compiler and run "
            "`pip install --force-reinstall --no-deps .` again"
        )
    handle = _open(path)
    wanted = os.environ.get(VARIANT_VARIABLE)
    for index, (name, runs, width) in enumerate(variants(handle)):
        if runs and wanted in (None, "", name):
            return Library(path, handle, index, name, width)
    raise LibraryError(f"{VARIANT_VARIABLE}={wanted}: not a variant that this processor runs")
