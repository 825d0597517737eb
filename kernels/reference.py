"""Every primitive of a search cell in plain torch: the specification of the kernels.

Slow and simple, for every floating dtype. ``Reference`` implements ``operation.Backend``; read
there what each primitive computes. Gradients come from autograd on the forward expressions, so
they share no algebra with the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox, plan
from .operation import Dropout, Operation


def _wide(x: Tensor) -> Tensor:
    """Storage to the dtype of the arithmetic."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _nchw(x: Tensor) -> Tensor:
    return _wide(x).permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def convolution(operation: Operation, x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """``W depthwise(relu(x))`` of x ``[N, C, H, W]``."""
    z = F.conv2d(
        torch.relu(x),
        depthwise,
        stride=operation.stride,
        padding=operation.padding,
        dilation=operation.dilation,
        groups=x.shape[1],
    )
    return F.conv2d(z, pointwise[:, :, None, None])


def factorized(x: Tensor, pointwise: Tensor) -> Tensor:
    """1×1 convolutions of the even and of the odd pixels of relu(x), added."""
    even, odd = pointwise.chunk(2, dim=1)
    x = torch.relu(x)
    shifted = F.pad(x[:, :, 1:, 1:], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    first = F.conv2d(x, even[:, :, None, None], stride=2)
    return first + F.conv2d(shifted, odd[:, :, None, None], stride=2)


def pool(operation: Operation, x: Tensor) -> Tensor:
    """3×3 pool of x ``[N, C, H, W]``; the average counts only pixels of the image."""
    if operation.kind == plan.MAX_POOL:
        return F.max_pool2d(x, 3, stride=operation.stride, padding=1)
    return F.avg_pool2d(x, 3, stride=operation.stride, padding=1, count_include_pad=False)


def _forward(
    operation: Operation, x: Tensor, depthwise: Tensor | None, pointwise: Tensor | None
) -> Tensor:
    """``y`` of any operation but a SKIP, for x ``[N, C, H, W]``."""
    if operation.kind in (plan.MAX_POOL, plan.AVG_POOL):
        return pool(operation, x)
    assert pointwise is not None
    if operation.kind == plan.FACTORIZED:
        return factorized(x, pointwise)
    if operation.kind == plan.POINTWISE:
        return F.conv2d(torch.relu(x), pointwise[:, :, None, None])
    assert depthwise is not None
    return convolution(operation, x, depthwise, pointwise)


def _store(operation: Operation, y: Tensor) -> None:
    assert operation.y is not None
    operation.y.copy_(_nhwc(y))
    if operation.sums is not None:
        stored = _wide(operation.y).double().flatten(0, 2)
        operation.sums[0] = stored.mean(0)
        operation.sums[1] = stored.var(0, unbiased=False)


def _output_gradient(operation: Operation) -> Tensor:
    assert operation.grad is not None and operation.coef is not None and operation.y is not None
    first, second, third = operation.coef.to(_wide(operation.y).dtype)
    return _nchw(first * _wide(operation.grad) + second * _wide(operation.y) + third)


def _backward(
    operation: Operation, x: Tensor, forward: Callable[..., Tensor]
) -> Tensor:
    """Gradient of ``forward`` to x for dy; writes the weight gradients that are asked for."""
    dy = _output_gradient(operation)
    leaf = x.detach().requires_grad_()
    weights = [
        None if weight is None else weight.detach().to(x.dtype).requires_grad_()
        for weight in (operation.depthwise, operation.pointwise)
    ]
    with torch.enable_grad():
        y = forward(operation, leaf, *weights)
    wanted = [
        (weight, target)
        for weight, target in zip(
            weights, (operation.grad_depthwise, operation.grad_pointwise), strict=True
        )
        if weight is not None and target is not None
    ]
    grads = torch.autograd.grad(y, [leaf, *(weight for weight, _ in wanted)], dy)
    for grad, (_, target) in zip(grads[1:], wanted, strict=True):
        target.copy_(grad)
    return grads[0]


def _dropped(operation: Operation, x: Tensor, dropout: Dropout) -> Tensor:
    """``dropout(x)`` of x ``[N, H, W, C]``."""
    x = _wide(x)
    if operation.stream < 0:
        return x
    assert dropout.rate is not None and dropout.state is not None
    return _nhwc(philox.dropout(_nchw(x), dropout.rate, dropout.state, operation.stream))


class Reference:
    """The primitives of ``operation.Backend`` in plain torch."""

    def channels(self, count: int) -> int:
        return count

    def coefficient_dtype(self, storage: Tensor) -> torch.dtype:
        return _wide(storage).dtype

    def fan_out(self, x: Tensor, operations: list[Operation]) -> None:
        image = _nchw(x)
        for operation in operations:
            y = _forward(operation, image, operation.depthwise, operation.pointwise)
            _store(operation, y)

    def mid(self, operations: list[Operation]) -> None:
        for operation in operations:
            assert operation.depthwise is not None and operation.pointwise is not None
            x = self._normalised(operation)
            _store(operation, convolution(operation, x, operation.depthwise, operation.pointwise))

    def _normalised(self, operation: Operation) -> Tensor:
        assert operation.input is not None
        return _nchw(_wide(operation.input) * operation.scale + operation.shift)

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        y.copy_(_wide(y) * scale + shift)

    def mix(
        self, operations: list[Operation], shift: Tensor, out: Tensor, dropout: Dropout
    ) -> None:
        total = shift.expand(out.shape)
        for operation in operations:
            if operation.kind == plan.SKIP:
                assert operation.input is not None
                term = _dropped(operation, operation.input, dropout)
            else:
                assert operation.y is not None
                term = _wide(operation.y)
            total = total + term * operation.scale
        out.copy_(total)

    def reduce(
        self, grad: Tensor, operations: list[Operation], sums: Tensor, dropout: Dropout
    ) -> None:
        g = _wide(grad).double()
        sums.copy_(g.sum((0, 1, 2)))
        for operation in operations:
            assert operation.sums is not None
            if operation.kind == plan.SKIP:
                assert operation.input is not None
                value = _dropped(operation, operation.input, dropout)
            else:
                assert operation.y is not None
                value = _wide(operation.y) * operation.scale + operation.shift
            operation.sums[0] = (g * value).sum((0, 1, 2))

    def mid_backward(self, operations: list[Operation]) -> None:
        for operation in operations:
            assert operation.grad_input is not None and operation.sums is not None
            x = self._normalised(operation)
            operation.grad_input.copy_(_nhwc(_backward(operation, x, convolution)))
            stored = _wide(operation.grad_input).double()
            operation.sums[0] = stored.sum((0, 1, 2))
            operation.sums[1] = (stored * _nhwc(torch.relu(x))).sum((0, 1, 2))

    def fan_in(
        self,
        x: Tensor,
        operations: list[Operation],
        incoming: Tensor | None,
        out: Tensor | None,
        dropout: Dropout,
    ) -> None:
        image = _nchw(x)
        total = torch.zeros_like(image) if incoming is None else _nchw(incoming)
        for operation in operations:
            if operation.kind == plan.SKIP:
                assert operation.grad is not None
                # The mask is a factor of each element: dropping g is the backward of dropping x.
                term = _dropped(operation, operation.grad, dropout) * operation.scale
                total = total + _nchw(term)
            else:
                total = total + _backward(operation, image, _forward)
        if out is not None:
            out.copy_(_nhwc(total))
