"""The average over all pixels in front of a classifier, without images of its gradient.

Torch's pool makes an array of its input's size for its gradient, and one of twice that size to add
up bfloat16. On a processor that is fresh memory in every step, at a page fault for each 4 KiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.kernels import backends
from pdarts_fast.kernels.cpu.memory import pool
from pdarts_fast.kernels.rows import is_traced


class _Mean(torch.autograd.Function):
    """``x.mean((2, 3), keepdim=True)``, number for number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        rows = x.detach()
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            # As torch does, but in memory that is there already.
            shape = (x.shape[0], *x.shape[2:], x.shape[1])
            rows = pool.empty(shape, torch.float32).permute(0, 3, 1, 2).copy_(rows)
        return rows.mean((2, 3), keepdim=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A view: one number a channel for all pixels.
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


class GlobalPool(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d(1)``: ``[N, C, H, W]`` to ``[N, C, 1, 1]``, and its gradient.

    Attributes:
        backend: Name of what runs the cells in front; with ``reference`` torch's own pool runs.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.backend = backends.REFERENCE

    def forward(self, input: Tensor) -> Tensor:
        """The mean of every channel."""
        if self.backend == backends.REFERENCE or is_traced(input):
            return super().forward(input)
        return _Mean.apply(input)
