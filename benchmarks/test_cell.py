"""One normal stage-1 cell, forward and backward: fused against the published graph.

Rivals take turns within a round, so a busy machine slows all of them; ratios are in
``extra_info``. Nothing is reported for a cell whose result is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.bench import measure
from pdarts_fast.supernet import Cell

SIZES = {"c16-32x32": (16, 32), "c32-16x16": (32, 16), "c64-8x8": (64, 8)}
BATCH = 8


@pytest.mark.parametrize(("channels", "side"), SIZES.values(), ids=SIZES.keys())
def test_cell(
    benchmark: Any, compiled: str, machine: dict[str, Any], channels: int, side: int
) -> None:
    torch.manual_seed(0)
    table = np.ones((14, 8), dtype=bool)
    cell = Cell(4 * channels, 4 * channels, channels, table, reduction=False, reduction_prev=False)
    cell.use_backend(compiled)
    last = torch.randn(BATCH, 4 * channels, side, side).to(memory_format=torch.channels_last)
    weights = torch.rand(14, 8).requires_grad_()
    last.requires_grad_()
    plain = last.detach().contiguous().requires_grad_()

    def fused() -> torch.Tensor:
        out = cell(last, last, weights)
        out.sum().backward()
        return out.detach()

    def published() -> None:
        cell.forward_op_by_op(plain, plain, weights).sum().backward()

    def channels_last() -> None:
        cell.forward_op_by_op(last, last, weights).sum().backward()

    want = cell.forward_op_by_op(plain, plain, weights).detach()
    error = ((fused() - want).abs().max() / want.abs().max()).item()
    assert error < 1e-4
    rivals = {"fused": fused, "published": published, "channels-last": channels_last}
    timings = measure.interleaved(rivals, 2)
    benchmark.extra_info.update(machine)
    benchmark.extra_info["error"] = error
    for name in ("published", "channels-last"):
        benchmark.extra_info[f"times faster than {name}"] = (
            timings[name].median / timings["fused"].median
        )
    benchmark.pedantic(fused, rounds=5, warmup_rounds=1)
