"""The pool in front of the classifier: torch's numbers, without its images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.kernels import backends
from pdarts_fast.pooling import GlobalPool
from pdarts_fast.supernet import Network


def fused_pool() -> GlobalPool:
    pool = GlobalPool()
    pool.backend = "cpu"
    return pool


def outcome(pool: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input for a loss that weighs the outputs."""
    x = x.clone().requires_grad_()
    out = pool(x)
    out.backward(weight)
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_are_those_of_torch(
    dtype: torch.dtype, size: tuple[int, int], layout: torch.memory_format
) -> None:
    x = torch.randn(3, 256, *size).to(dtype).to(memory_format=layout)
    weight = torch.randn(3, 256, 1, 1).to(dtype)
    found = outcome(fused_pool(), x, weight)
    wanted = outcome(nn.AdaptiveAvgPool2d(1), x, weight)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_gradient_is_no_image() -> None:
    out = fused_pool()(x := torch.randn(2, 16, 8, 8, requires_grad=True))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.untyped_storage().nbytes() == 2 * 16 * 4


def test_the_gradient_can_be_differentiated() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(fused_pool(), (x,))


def test_the_published_graph_keeps_the_pool_of_torch() -> None:
    for backend in (backends.REFERENCE, "cpu"):
        if not backends.available()[backend].usable:
            continue
        network = Network(8, 10, 3, nn.functional.cross_entropy, backend=backend)
        network(torch.randn(2, 3, 8, 8))
        assert network.global_pooling.backend == backend


def test_a_trace_has_the_pool_of_torch() -> None:
    compiled = torch.compile(fused_pool(), backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(compiled(x), x.mean((2, 3), keepdim=True))
