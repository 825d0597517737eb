"""Backward of second halves of separable convolutions, by the kernels of three other files.

    dy = c0 g + c1 y + c2,    v = relu(input scale + shift)
    dz = dy W                       output_gradient.py, which also writes v if weights want it
    dv = [v > 0] (d transposed * dz), sum dv, sum dv v              transposed.py, sums.py
    dW = dy' z,   dd                                         weight_gradient.py

Five launches for all items of a call, three without weight gradients.

Reference: ``Reference.mid_backward``. Test: tests/triton_interpret.
"""

from __future__ import annotations

from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .coefficients import Entering
from .gradient_rows import device_table
from .output_gradient import PRODUCT, RECTIFY, output_gradient
from .sums import sum_partials
from .transposed import transposed
from .weight_gradient import weight_gradients
from .weight_tasks import make_task, product


def _gradient_rows(
    call: Call, offsets: list[int], channels: int, numbers: tuple[int, ...]
) -> list[list[int]]:
    return [
        [PRODUCT, number, item.slot, item.node, -1, offsets[item.pointwise], i, 0, channels]
        for i, (number, item) in enumerate(zip(numbers, call.items, strict=True))
    ]


def _entering_rows(
    call: Call, offsets: list[int], channels: int, places: tuple[int, ...]
) -> list[list[int]]:
    rows = _gradient_rows(call, offsets, channels, places)
    return [[*row, *[0] * 5, place] for row, place in zip(rows, places, strict=True)]


def _rectified_rows(call: Call) -> list[list[int]]:
    return [[RECTIFY, i, 0, 0, -1, 0, i, 0, 0, item.input] for i, item in enumerate(call.items)]


def _transposed(
    call: Call, arrays: Arrays, dz: Tensor, second: tuple[Tensor, Tensor], rows: tuple[int, ...]
) -> Tensor:
    """Writes the halves' gradients; returns parts of their sums, float32 ``[2 n, parts, C]``."""
    assert arrays.half_grads is not None
    items, offsets, device = call.items, arrays.weights.layout.offsets, dz.device
    groups = device_table(
        call,
        ("groups", rows),
        device,
        lambda: [
            [i, i + 1, item.half, item.input, row]
            for i, (row, item) in enumerate(zip(rows, items, strict=True))
        ],
    )
    table = device_table(
        call,
        ("transposed", dz.shape[-1]),
        device,
        lambda: [[common.kind(item), i, offsets[item.depthwise]] for i, item in enumerate(items)],
    )
    partials = transposed(arrays, groups, len(items), table, dz, arrays.half_grads, second=second)
    assert partials is not None
    return partials


def half_gradients(
    call: Call,
    arrays: Arrays,
    norms: Tensor,
    rows: tuple[int, ...],
    coef: Tensor,
    places: tuple[int, ...],
    enter: Entering,
) -> Tensor:
    """Gradients of first halves' normalised outputs, of no weight: two launches.

    Args:
        norms: Scale and shift, float64 ``[.., 2, C]``.
        rows: Rows of norms of what the items read.
        coef: float32 ``[.., 3, C]``, written for everything that enters the node.
        places: Rows of the items in ``enter.table``.
        enter: What coefficients are made of.

    Returns:
        Of every item parts of the sum of the gradient, and of its product with the normalised
        output, float32 ``[2 n, parts, C]``.
    """
    y, channels = arrays.y, arrays.y.shape[-1]
    offsets = arrays.weights.layout.offsets
    dz = y.new_empty(len(call.items), *y.shape[1:])
    table = device_table(
        call,
        ("output_gradient", channels, places),
        y.device,
        lambda: _entering_rows(call, offsets, channels, places),
    )
    size = (y.shape[2], y.shape[3])
    output_gradient(arrays, table, len(table), dz, dz, y[0], size, coef, enter=enter)
    return _transposed(call, arrays, dz, (norms[:, 0], norms[:, 1]), rows)


def mid_backward(
    call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, coef: Tensor, sums: Tensor
) -> None:
    """``interface.Backend.mid_backward``."""
    y, items = arrays.y, call.items
    common.check_storage(y)
    channels, offsets = y.shape[-1], arrays.weights.layout.offsets
    wanted = arrays.weights.grad is not None
    size, numbers = (y.shape[2], y.shape[3]), tuple(range(len(items)))
    stack = y.new_empty(2 if wanted else 1, len(items), *y.shape[1:])
    dz, rectified = stack[0], stack[-1]
    table = device_table(
        call,
        ("output_gradient and inputs", channels, wanted),
        y.device,
        lambda: (
            _gradient_rows(call, offsets, channels, numbers)
            + (_rectified_rows(call) if wanted else [])
        ),
    )
    output_gradient(arrays, table, len(table), dz, rectified, y[0], size, coef, scale, shift)
    sum_partials(_transposed(call, arrays, dz, (scale, shift), numbers), sums)
    if wanted:
        products = tuple(product(item, i, i, offsets) for i, item in enumerate(items))
        task = make_task(arrays, products, rectified, rectified=True)
        weight_gradients(call, arrays, task, rectified, coef)
