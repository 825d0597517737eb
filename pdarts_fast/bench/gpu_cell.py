"""One search cell with all operations against its rivals: the benchmark of a GPU.

All rivals are forward and backward passes of one cell in a weight step. On a GPU the fused cell is
also replayed from a graph, as searches run it: what its kernels take without their launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdarts_fast.bench import measure
from pdarts_fast.kernels.cell import prepare
from pdarts_fast.supernet import Cell

FUSED, REPLAYED = "fused", "fused, replayed"
PUBLISHED, AUTOCAST, COMPILED = "published", "published in autocast", "torch.compile"


@dataclass(frozen=True)
class CellBench:
    """A normal cell and its inputs.

    Attributes:
        cell: With the backend that is measured.
        s0, s1: Outputs of the cells before, bfloat16 ``[N, 4 C, H, W]``, channels-last.
        weights: Of the operations, float32 ``[14, 8]``.
    """

    cell: Cell
    s0: Tensor
    s1: Tensor
    weights: Tensor

    @staticmethod
    def make(channels: int, side: int, batch: int, backend: str, device: torch.device) -> CellBench:
        """A cell in training on random inputs.

        Args:
            channels: C.
            side: H and W.
            backend: Name of what runs it.
        """
        torch.manual_seed(0)
        depth = 4 * channels
        table = np.ones((14, 8), dtype=bool)
        cell = Cell(depth, depth, channels, table, reduction=False, reduction_prev=False)
        cell.to(device).use_backend(backend)

        def image() -> Tensor:
            x = torch.randn(batch, depth, side, side, device=device, dtype=torch.bfloat16)
            return x.to(memory_format=torch.channels_last).requires_grad_()

        weights = torch.rand(14, 8, device=device).softmax(-1).requires_grad_()
        return CellBench(cell, image(), image(), weights)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.s1.device.type, torch.bfloat16)

    def fused(self) -> Tensor:
        """One pass of the backend; the output."""
        with self._autocast():
            out = self.cell(self.s0, self.s1, self.weights)
        out.sum().backward()
        return out.detach()

    def rivals(self, *, compiled: bool) -> dict[str, Callable[[], object]]:
        """Passes by name; ``compiled``: with torch.compile, which takes a minute."""
        s0, s1 = (x.detach().float().contiguous().requires_grad_() for x in (self.s0, self.s1))
        found: dict[str, Callable[[], object]] = {FUSED: self.fused}

        def published() -> None:
            self.cell.forward_op_by_op(s0, s1, self.weights).sum().backward()

        def autocast(forward: Callable[..., Tensor]) -> None:
            with self._autocast():
                out = forward(self.s0, self.s1, self.weights)
            out.sum().backward()

        found[PUBLISHED] = published
        found[AUTOCAST] = lambda: autocast(self.cell.forward_op_by_op)
        if compiled:
            forward = torch.compile(self.cell.forward_op_by_op)
            found[COMPILED] = lambda: autocast(forward)
        return found

    def bytes(self) -> int:
        """What the launches of a fused pass must move, each array once; see ``traffic``."""
        from pdarts_fast.kernels.triton.record import record_cell
        from pdarts_fast.kernels.triton.traffic import traffic

        batch, _, height, width = self.s1.shape
        key = prepare(self.cell).key
        recorded = record_cell(key, batch, (height, width), torch.bfloat16, True, True)
        return sum(traffic(launch) for launch in (*recorded.forward, *recorded.backward))


def _synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _replay(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Replays a graph of a call that has run before."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_cell(bench: CellBench, repeats: int, *, compiled: bool) -> dict[str, float]:
    """Numbers by name: milliseconds of every rival, ratios, GB/s, roofline, and on a GPU memory.

    The roofline is the time that a stream copy on the same device takes for the bytes of a pass.
    """
    device = bench.s1.device
    rivals = bench.rivals(compiled=compiled)
    found: dict[str, float] = {}
    if device.type == "cuda":
        for name in (FUSED, PUBLISHED):
            rivals[name]()
            bench.cell.zero_grad()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            rivals[name]()
            peak = torch.cuda.max_memory_allocated(device) - before
            found[f"peak MiB, {name}"] = peak / 2**20
        rivals[REPLAYED] = _replay(bench.fused, device)
    calls = {name: _synchronised(call, device) for name, call in rivals.items()}
    seconds = {name: t.median for name, t in measure.interleaved(calls, repeats).items()}
    ours = seconds.get(REPLAYED, seconds[FUSED])
    found |= {f"ms, {name}": 1e3 * value for name, value in seconds.items()}
    for name in seconds.keys() - {FUSED, REPLAYED}:
        found[f"times faster than {name}"] = seconds[name] / ours
    moved = bench.bytes()
    found["GB/s"] = moved / ours / 1e9
    found["times its roofline"] = ours * measure.copy_rate(device=device) / moved
    return found
