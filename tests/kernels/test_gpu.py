"""The Triton kernels on a real GPU: ``pytest -m gpu tests/kernels/test_gpu.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.triton import load, self_check

pytestmark = pytest.mark.gpu

CASES = {
    "all-operations": {"channels": 16, "batch": 4},
    "reduction-pruned": {"reduction": True, "reduction_prev": True, "live": 5, "batch": 4},
    "dropout-odd-channels": {"dropout": 0.7, "channels": 6, "height": 5, "width": 3},
    "evaluation": {"training": False},
}


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device that backend triton runs on, or a skip."""
    found = load.availability()
    if not found.usable:
        pytest.skip(f"{found.reason}; run this on a machine with a GPU of sm_80 or newer")
    load.register()
    return torch.device("cuda", 0)


def test_every_kernel_passes_its_self_check(gpu: torch.device) -> None:
    assert [one for one in self_check.check(gpu) if not one.is_good] == []


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_a_cell_and_its_gradients(
    gpu: torch.device, make_case: Any, run: Any, close: Any, arguments: dict[str, Any]
) -> None:
    case = make_case(**arguments)
    cell, inputs = case.cell(), case.inputs()
    want = run(cell, inputs, "op-by-op", torch.float64)
    for parameter in cell.parameters():
        parameter.grad = None
    cell.float().to(gpu)
    s0, s1, weights = (x.float().to(gpu).requires_grad_() for x in inputs)
    out = fused.run("triton", cell, s0, s1, weights)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * noise.float().to(gpu)).sum().backward()
    found = {"out": out.detach(), "s0": s0.grad, "s1": s1.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in cell.named_parameters()}
    found |= dict(cell.named_buffers())
    got = {name: value.cpu().double() for name, value in found.items() if value is not None}
    close(got, want, 5e-5)


def test_a_pass_reads_nothing_back_to_the_host(gpu: torch.device, make_case: Any) -> None:
    case = make_case(dropout=0.4)
    cell = case.cell().float().to(gpu)
    s0, s1, weights = (x.float().to(gpu).requires_grad_() for x in case.inputs())
    fused.run("triton", cell, s0, s1, weights).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.run("triton", cell, s0, s1, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
