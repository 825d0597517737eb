"""The supernet's stem with half the memory: its BatchNorm is differentiated from its output.

    xhat = (out - beta) / gamma

is what its backward pass needs of its input, and the cells keep the output anyway.

Source: arXiv 1712.02616, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.kernels.cell import is_traced

# Undoing scale and shift costs log2(1 + |beta / gamma|) bits of xhat.
_MOST_SHIFT = 16.0
_LEAST_SCALE = 1e-6


class _FromOutput(torch.autograd.Function):
    """BatchNorm in training that saves its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        assert norm.momentum is not None
        out, _, inverse = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(out, weight, bias, inverse)
        ctx.eps = norm.eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weight, bias, inverse = ctx.saved_tensors
        # That of a BatchNorm of `out`, of mean beta and deviation gamma.
        return *torch.ops.aten.native_batch_norm_backward(
            grad, out, weight.square() * inverse, None, None, bias, 1 / weight, True, ctx.eps,
            list(ctx.needs_input_grad[:3]),
        ), None  # fmt: skip


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _is_usual(stem: nn.Sequential, x: Tensor) -> bool:
    """Whether the stem is as it was built, and outside of traces."""
    norm = stem[1]
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and not any(map(_has_hooks, (stem, *stem)))
        and not is_traced(x)
    )


def run(stem: nn.Sequential, x: Tensor, *, fused: bool) -> Tensor:
    """What ``stem(x)`` returns.

    Args:
        stem: A convolution and a BatchNorm.
        x: Images.
        fused: Whether the network's cells are; the published graph stays what it is.
    """
    if not (fused and x.device.type == "cpu" and torch.is_grad_enabled() and _is_usual(stem, x)):
        return stem(x)
    convolution, norm = stem[0], stem[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    y, weight, bias = convolution(x), norm.weight, norm.bias
    scale = weight.detach().abs()
    small = (bias.detach().abs() > _MOST_SHIFT * scale) | (scale < _LEAST_SCALE)
    if y.dtype != torch.float32 or not y.requires_grad or bool(small.any()):
        return norm(y)
    norm.num_batches_tracked.add_(1)
    return _FromOutput.apply(y, weight, bias, norm)
