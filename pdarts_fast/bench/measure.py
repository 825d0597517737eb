"""Timing rivals fairly on a machine that others use too, and what the machine itself can do."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdarts_fast.kernels.cpu.memory import pool


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    best: float
    median: float
    repeats: int


def interleaved(
    rivals: Mapping[str, Callable[[], object]], repeats: int, turn: float = 0.0
) -> dict[str, Timing]:
    """Times rivals in turns, after one call of each to warm up.

    A busy neighbour then slows all of them and not one. With a ``turn`` short calls follow one
    another as in training, and are not those that find caches and memory as another left them.

    Args:
        rivals: Calls by name.
        repeats: Rounds.
        turn: Seconds that a turn lasts at least. The mean of its calls counts, without the first
            one where others follow.
    """
    for call in rivals.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, call in rivals.items():
            spent: list[float] = []
            while not spent or sum(spent) < turn:
                start = time.perf_counter()
                call()
                spent.append(time.perf_counter() - start)
            seconds[name].append(statistics.mean(spent[1:] or spent))
    return {
        name: Timing(min(values), statistics.median(values), repeats)
        for name, values in seconds.items()
    }


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a large float32 matrix product: what arithmetic can reach here."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = interleaved({"product": lambda: a @ b}, repeats)["product"]
    return 2 * size**3 / timing.best


def copy_rate(mebibytes: int = 128, repeats: int = 5, device: torch.device | str = "cpu") -> float:
    """Bytes/s read plus written by a stream copy: what memory can reach on a device."""
    source = torch.zeros(mebibytes << 18, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)

    timing = interleaved({"copy": copy}, repeats)["copy"]
    return 2 * source.nbytes / timing.best


def release_memory() -> None:
    """Hands freed memory back to the system, which the C library and the kernels would keep."""
    gc.collect()
    pool.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def saved_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, without parameters and buffers.

    Args:
        network: Whose parameters and buffers do not count.
        forward: Runs it.
    """
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        # Kept itself, an output would hold the operation that saved it, which holds the output.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = forward()
    del kept
    return sum(storages.values())
