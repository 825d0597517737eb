"""Every primitive of a search cell in plain torch: the specification of the kernels.

Slow and simple, for every floating dtype. ``Reference`` implements ``interface.Backend``; read
there what each primitive computes. Gradients are torch's own of each layer: inside an operator
autograd does not record.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox, plan
from .calls import Call, Item
from .interface import Arrays
from .weights import Weights


def _wide(x: Tensor) -> Tensor:
    """Storage to the dtype of the arithmetic."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _nchw(x: Tensor) -> Tensor:
    return _wide(x).permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _weights(item: Item, weights: Weights) -> tuple[Tensor, Tensor]:
    """Depthwise ``[C, 1, k, k]`` (empty if none) and pointwise ``[C, Cx, 1, 1]`` weights."""
    pointwise = weights.matrix(item.pointwise)
    if item.kind == plan.FACTORIZED:
        pointwise = torch.cat([pointwise, weights.matrix(item.pointwise + 1)])
    if item.kind != plan.CONV:
        return pointwise.new_empty(0), pointwise[:, :, None, None]
    taps = weights.matrix(item.depthwise)
    return taps.view(-1, 1, item.kernel, item.kernel), pointwise[:, :, None, None]


def _geometry(item: Item, channels: int) -> tuple[int, int, int, int]:
    """Stride, padding, dilation and groups of a depthwise convolution."""
    return item.stride, item.padding, item.dilation, channels


def _shifted(x: Tensor) -> Tensor:
    """The image moved up and left by one pixel; an odd side gets a row of zeros."""
    return F.pad(x[:, :, 1:, 1:], (0, x.shape[3] % 2, 0, x.shape[2] % 2))


def forward(item: Item, x: Tensor, weights: Weights) -> Tensor:
    """Output before BatchNorm of an item but a skip, of x ``[N, C, H, W]``."""
    if item.kind == plan.MAX_POOL:
        return F.max_pool2d(x, 3, stride=item.stride, padding=1)
    if item.kind == plan.AVG_POOL:
        return F.avg_pool2d(x, 3, stride=item.stride, padding=1, count_include_pad=False)
    r = torch.relu(x)
    taps, pointwise = _weights(item, weights)
    if item.kind == plan.CONV:
        return F.conv2d(F.conv2d(r, taps, None, *_geometry(item, x.shape[1])), pointwise)
    if item.kind == plan.POINTWISE:
        return F.conv2d(r, pointwise)
    split = weights.layout.padded[item.pointwise][0]
    even, odd = pointwise[:split], pointwise[split:]
    halves = [F.conv2d(r, even, stride=2), F.conv2d(_shifted(r), odd, stride=2)]
    return torch.cat(halves, dim=1)


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of a bias-free convolution to its input and its weight."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        groups,
        [True, True, False],
    )
    return dx, dw


def _write(weights: Weights, index: int, grad: Tensor) -> None:
    if weights.grad is not None:
        target = weights.grad_matrix(index)
        target.copy_(grad.reshape(target.shape))


def _separable_backward(item: Item, x: Tensor, dy: Tensor, weights: Weights) -> Tensor:
    r = torch.relu(x)
    taps, pointwise = _weights(item, weights)
    geometry = _geometry(item, x.shape[1])
    z = F.conv2d(r, taps, None, *geometry)
    dz, grad = _convolution_backward(dy, z, pointwise, 1, 0, 1, 1)
    _write(weights, item.pointwise, grad)
    dr, grad = _convolution_backward(dz, r, taps, *geometry)
    _write(weights, item.depthwise, grad)
    return dr * (x > 0)


def _one_by_one_backward(item: Item, x: Tensor, dy: Tensor, weights: Weights) -> Tensor:
    r = torch.relu(x)
    _, pointwise = _weights(item, weights)
    if item.kind == plan.POINTWISE:
        dr, grad = _convolution_backward(dy, r, pointwise, 1, 0, 1, 1)
        _write(weights, item.pointwise, grad)
        return dr * (x > 0)
    split = weights.layout.padded[item.pointwise][0]
    dr, grad = _convolution_backward(dy[:, :split], r, pointwise[:split], 2, 0, 1, 1)
    _write(weights, item.pointwise, grad)
    shifted = _shifted(r)
    d_shifted, grad = _convolution_backward(dy[:, split:], shifted, pointwise[split:], 2, 0, 1, 1)
    _write(weights, item.pointwise + 1, grad)
    dr[:, :, 1:, 1:] += d_shifted[:, :, : x.shape[2] - 1, : x.shape[3] - 1]
    return dr * (x > 0)


def _pool_backward(item: Item, x: Tensor, dy: Tensor) -> Tensor:
    size, stride, padding = [3, 3], [item.stride] * 2, [1, 1]
    if item.kind == plan.AVG_POOL:
        return torch.ops.aten.avg_pool2d_backward(dy, x, size, stride, padding, False, False, None)
    _, indices = F.max_pool2d(x, 3, item.stride, 1, return_indices=True)
    return torch.ops.aten.max_pool2d_with_indices_backward(
        dy, x, size, stride, padding, [1, 1], False, indices
    )


def backward(item: Item, x: Tensor, dy: Tensor, weights: Weights) -> Tensor:
    """Gradient of ``forward`` to x for dy; writes the weight gradients if there is room."""
    if item.kind in (plan.MAX_POOL, plan.AVG_POOL):
        return _pool_backward(item, x, dy)
    if item.kind == plan.CONV:
        return _separable_backward(item, x, dy, weights)
    return _one_by_one_backward(item, x, dy, weights)


def _output_gradient(coef: Tensor, grad: Tensor, y: Tensor) -> Tensor:
    return _nchw(coef[0] * _wide(grad) + coef[1] * _wide(y) + coef[2])


def _dropped(item: Item, x: Tensor, arrays: Arrays) -> Tensor:
    """``dropout(x)`` of x ``[N, H, W, C]``."""
    x = _wide(x)
    if item.stream < 0 or not arrays.training:
        return x
    return _nhwc(philox.dropout(_nchw(x), arrays.rate, arrays.state, item.stream))


def _pixel_sums(x: Tensor) -> Tensor:
    return x.double().sum((0, 1, 2))


class Reference:
    """The primitives of ``interface.Backend`` in plain torch."""

    def channels(self, count: int) -> int:
        return count

    def coefficient_dtype(self, storage: torch.dtype) -> torch.dtype:
        return torch.float64 if storage == torch.float64 else torch.float32

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    def _store(self, item: Item, arrays: Arrays, y: Tensor, sums: Tensor) -> None:
        stored = arrays.y[item.slot]
        stored.copy_(_nhwc(y))
        rows = _wide(stored).double().flatten(0, 2)
        sums[0] = rows.mean(0)
        sums[1] = rows.var(0, unbiased=False)

    def fan_out(self, call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
        for i, item in enumerate(call.items):
            self._store(item, arrays, forward(item, _nchw(x), arrays.weights), sums[i])

    def mid(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
        for i, item in enumerate(call.items):
            x = _nchw(_wide(arrays.y[item.input]) * scale[i] + shift[i])
            self._store(item, arrays, forward(item, x, arrays.weights), sums[i])

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        y.copy_(_wide(y) * scale + shift)

    def mix(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        total = shift.expand(out.shape)
        for i, item in enumerate(call.items):
            if item.kind == plan.SKIP:
                term = _dropped(item, arrays.states[item.source], arrays)
            else:
                term = _wide(arrays.y[item.slot])
            total = total + term * scale[i]
        out.copy_(total)

    def reduce(
        self,
        call: Call,
        arrays: Arrays,
        grad: Tensor,
        scale: Tensor,
        shift: Tensor,
        sums: Tensor,
    ) -> None:
        g = _wide(grad)
        sums[0] = _pixel_sums(g)
        for i, item in enumerate(call.items):
            if item.kind == plan.SKIP:
                value = _dropped(item, arrays.states[item.source], arrays)
            else:
                value = _wide(arrays.y[item.slot]) * scale[i] + shift[i]
            sums[1 + i] = _pixel_sums(g * value)

    def mid_backward(
        self,
        call: Call,
        arrays: Arrays,
        scale: Tensor,
        shift: Tensor,
        coef: Tensor,
        sums: Tensor,
    ) -> None:
        assert arrays.half_grads is not None
        for i, item in enumerate(call.items):
            normalised = _wide(arrays.y[item.input]) * scale[i] + shift[i]
            dy = _output_gradient(coef[i], arrays.grads[item.node], arrays.y[item.slot])
            out = arrays.half_grads[item.half]
            out.copy_(_nhwc(backward(item, _nchw(normalised), dy, arrays.weights)))
            sums[i, 0] = _pixel_sums(_wide(out))
            sums[i, 1] = _pixel_sums(_wide(out) * torch.relu(normalised))

    def fan_in(
        self,
        call: Call,
        arrays: Arrays,
        x: Tensor,
        coef: Tensor,
        incoming: Tensor | None,
        out: Tensor | None,
    ) -> None:
        image = _nchw(x)
        total = torch.zeros_like(image) if incoming is None else _nchw(incoming)
        for i, item in enumerate(call.items):
            if item.kind == plan.SKIP:
                # The mask is a factor of each element: dropping g is the backward of dropping x.
                term = _nchw(_dropped(item, arrays.grads[item.node], arrays) * coef[i, 0])
            else:
                grad = arrays.grads[item.node]
                if item.half >= 0:
                    assert arrays.half_grads is not None
                    grad = arrays.half_grads[item.half]
                dy = _output_gradient(coef[i], grad, arrays.y[item.slot])
                term = backward(item, image, dy, arrays.weights)
            total = total + term
        if out is not None:
            out.copy_(_nhwc(total))
