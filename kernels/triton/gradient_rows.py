"""What the backward kernels share: where a gradient lies, and tables made once a call.

The gradient of a branch's output before BatchNorm is ``dy = c0 g + c1 y + c2``, where g is that of
a node, or of a first half's normalised output. Nodes are arrays of their own, so kernels take four
pointers and pick one by the table; 16-byte accesses survive a ``tl.where`` of pointers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from .common import pixel_stride

MAX_NODES = 4
WIDTH = 16

_tables: WeakKeyDictionary[Call, dict[Hashable, Tensor]] = WeakKeyDictionary()


def device_table(
    call: Call, key: tuple[Hashable, ...], device: torch.device, make: Callable[[], list[list[int]]]
) -> Tensor:
    """Rows of a call as int32 ``[n, WIDTH]`` on the device, made once for every key.

    Args:
        call: Whose table it is.
        key: What else the rows depend on; begins with the name of the kernel.
        make: Makes the rows, each at most ``WIDTH`` long.
    """
    made = _tables.setdefault(call, {})
    found = made.get((*key, device))
    if found is None:
        rows = [row + [0] * (WIDTH - len(row)) for row in make()]
        found = torch.tensor(rows, dtype=torch.int32).reshape(-1, WIDTH).to(device)
        made[(*key, device)] = found
    return found


def node_gradients(arrays: Arrays) -> tuple[list[Tensor], list[int]]:
    """Four gradients of nodes and their pixel strides; those that do not exist repeat the first.

    Raises:
        ValueError: There are more.
    """
    if len(arrays.grads) > MAX_NODES:
        raise ValueError(f"Triton kernels take {MAX_NODES} nodes a cell, got {len(arrays.grads)}")
    found = [*arrays.grads, *[arrays.grads[0]] * MAX_NODES][:MAX_NODES]
    return found, [pixel_stride(grad) for grad in found]


@triton.jit
def pick_gradient(
    node, half, g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr, g0_pixel, g1_pixel, g2_pixel, g3_pixel,
    half_slot, C: tl.constexpr,
):  # fmt: skip
    """Pointer and pixel stride of the gradient of a node, or of a half if that is not -1."""
    low = tl.where(node == 0, g0_ptr, g1_ptr)
    high = tl.where(node == 2, g2_ptr, g3_ptr)
    half_row = half_ptr + tl.maximum(half, 0).to(tl.int64) * half_slot
    pointer = tl.where(half >= 0, half_row, tl.where(node < 2, low, high))
    low_pixel = tl.where(node == 0, g0_pixel, g1_pixel)
    high_pixel = tl.where(node == 2, g2_pixel, g3_pixel)
    pixel = tl.where(half >= 0, C, tl.where(node < 2, low_pixel, high_pixel))
    return pointer, tl.multiple_of(pixel, 16)


@triton.jit
def load_coefficients(coef_ptr, number, c, m_c, C: tl.constexpr):
    """c0, c1, c2 of an item, fp32 [1, BLOCK_C] each."""
    row = coef_ptr + number * (3 * C) + c
    c0 = tl.load(row, mask=m_c, other=0.0)[None, :]
    c1 = tl.load(row + C, mask=m_c, other=0.0)[None, :]
    c2 = tl.load(row + 2 * C, mask=m_c, other=0.0)[None, :]
    return c0, c1, c2
