"""A cell on a GPU against the published graph and torch.compile: ``-m gpu tests benchmarks``.

Correctness first (``tests/kernels/test_gpu.py`` has more); times in turns, peak memory, GB/s and
the ratio to the roofline are in ``extra_info`` (``--benchmark-json FILE``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdarts_fast.bench.gpu_cell import CellBench, measure_cell
from pdarts_fast.kernels.triton import load

# torch.compile takes minutes for a cell, so it runs at the first size only.
SIZES = {"c16-32x32": (16, 32, True), "c32-16x16": (32, 16, False), "c64-8x8": (64, 8, False)}
BATCH = 96


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side", "compiled"), SIZES.values(), ids=SIZES.keys())
def test_gpu_cell(
    benchmark: Any, machine: dict[str, Any], channels: int, side: int, compiled: bool
) -> None:
    found = load.availability()
    if not found.usable:
        pytest.skip(f"{found.reason}; run this on a machine with a GPU of sm_80 or newer")
    device = torch.device("cuda")
    bench = CellBench.make(channels, side, BATCH, "triton", device)
    with torch.no_grad():
        want = bench.cell.forward_op_by_op(bench.s0.float(), bench.s1.float(), bench.weights)
    error = ((bench.fused().float() - want).norm() / want.norm()).item()
    assert error < 0.03  # bfloat16
    benchmark.extra_info.update(machine)
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name(device)
    benchmark.extra_info["error"] = error
    benchmark.extra_info.update(measure_cell(bench, 10, compiled=compiled))

    def run() -> None:
        bench.fused()
        torch.cuda.synchronize(device)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
