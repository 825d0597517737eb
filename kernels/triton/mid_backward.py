"""Backward of second halves of separable convolutions, by the kernels of three other files.

    dy = c0 g + c1 y + c2,    v = relu(input scale + shift)
    dz = dy W                       output_gradient.py, which also writes v if weights want it
    dv = [v > 0] (d transposed * dz), sum dv, sum dv v              transposed.py, sums.py
    dW = dy' z,   dd                                         weight_gradient.py

Five launches for all items of a call, three without weight gradients.

Reference: ``Reference.mid_backward``. Test: tests/triton_interpret.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .gradient_rows import device_table
from .output_gradient import PRODUCT, RECTIFY, output_gradient
from .sums import sum_partials
from .transposed import transposed
from .weight_gradient import product, weight_gradients


def _gradient_rows(call: Call, offsets: list[int], channels: int, rectify: bool) -> list[list[int]]:
    rows = [
        [PRODUCT, i, item.slot, item.node, -1, offsets[item.pointwise], i, 0, channels]
        for i, item in enumerate(call.items)
    ]
    if rectify:
        rows += [
            [RECTIFY, i, 0, 0, -1, 0, i, 0, 0, item.input] for i, item in enumerate(call.items)
        ]
    return rows


def mid_backward(
    call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, coef: Tensor, sums: Tensor
) -> None:
    """``interface.Backend.mid_backward``."""
    assert arrays.half_grads is not None
    y, items = arrays.y, call.items
    common.check_storage(y)
    channels, offsets = y.shape[-1], arrays.weights.layout.offsets
    wanted = arrays.weights.grad is not None
    size = (y.shape[2], y.shape[3])
    stack = torch.empty(
        2 if wanted else 1, len(items), *y.shape[1:], dtype=y.dtype, device=y.device
    )
    dz, rectified = stack[0], stack[-1]
    table = device_table(
        call,
        ("output_gradient", channels, wanted),
        y.device,
        lambda: _gradient_rows(call, offsets, channels, wanted),
    )
    output_gradient(arrays, table, len(table), dz, rectified, y[0], size, coef, scale, shift)
    groups = device_table(
        call,
        ("groups", channels),
        y.device,
        lambda: [[i, i + 1, item.half, item.input] for i, item in enumerate(items)],
    )
    rows = device_table(
        call,
        ("transposed", channels),
        y.device,
        lambda: [[common.kind(item), i, offsets[item.depthwise]] for i, item in enumerate(items)],
    )
    partials = transposed(
        arrays, groups, len(items), rows, dz, arrays.half_grads, second=(scale, shift)
    )
    assert partials is not None
    sum_partials(partials, sums)
    if wanted:
        products = [product(item, i, i, offsets) for i, item in enumerate(items)]
        weight_gradients(
            call, arrays, products, rectified, size, coef, rectified=True
        )  # fmt: skip
