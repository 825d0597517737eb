"""Batch sums of a node's gradient with everything that enters the node.

    sums[0]     = sum of g
    sums[1 + i] = sum of g * (y_i * scale_i + shift_i)      or of g * dropout(x) for a skip

Program (row, part) goes through every ``parts``-th tile of one row and keeps a sum an element; it
reduces once at the end, since a reduction over pixels costs as much as a tile. The gradient, which
all rows share, comes from the second-level cache. A second launch adds the parts in their order.

Reference: ``Reference.reduce``. Test: tests/triton_interpret.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .common import SKIP, block_channels, pixel_stride
from .dropout import dropout_factor
from .record import search_specialisations
from .registry import Specialisation, register
from .sums import sum_partials

_SKIP: tl.constexpr = tl.constexpr(SKIP)
_ELEMENTS = 2048
# Programs of a call, and sums that a row of them may leave for every program that needs the row.
_PROGRAMS, _PARTS = 1024, 1024


@triton.jit(do_not_specialize=["pixels", "parts"])
def _reduce_kernel(
    grad_ptr, y_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr,
    scale_ptr, shift_ptr, rate_ptr, state_ptr, table_ptr, partials_ptr,
    grad_pixel, y_slot, x0_pixel, x1_pixel, x2_pixel, x3_pixel, x4_pixel, x5_pixel,
    pixels, parts,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Program (row, part). STEP: elements from a scale, or shift, to the next."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    tiles = tl.cdiv(pixels, BLOCK_P)
    if row == 0:
        for tile in range(part, tiles, parts):
            pixel = (tile * BLOCK_P + p).to(tl.int64)  # [BLOCK_P]
            m = (pixel < pixels)[:, None] & m_c[None, :]
            at = pixel[:, None] * grad_pixel + c[None, :]
            acc += tl.load(grad_ptr + at, mask=m, other=0.0).to(tl.float32)
    else:
        item = table_ptr + (row - 1) * 16
        source = tl.load(item + 5)
        if tl.load(item) == _SKIP:
            x_ptr = tl.where(source == 0, x0_ptr, tl.where(source == 1, x1_ptr, x2_ptr))
            x_ptr = tl.where(source == 3, x3_ptr, tl.where(source == 4, x4_ptr, x_ptr))
            x_ptr = tl.where(source == 5, x5_ptr, x_ptr)
            x_pixel = tl.where(source == 0, x0_pixel, tl.where(source == 1, x1_pixel, x2_pixel))
            x_pixel = tl.where(source == 3, x3_pixel, tl.where(source == 4, x4_pixel, x_pixel))
            x_pixel = tl.multiple_of(tl.where(source == 5, x5_pixel, x_pixel), 16)
            stream = tl.load(item + 8)
            for tile in range(part, tiles, parts):
                pixel = (tile * BLOCK_P + p).to(tl.int64)
                m = (pixel < pixels)[:, None] & m_c[None, :]
                at = pixel[:, None] * grad_pixel + c[None, :]
                g = tl.load(grad_ptr + at, mask=m, other=0.0).to(tl.float32)
                at = pixel[:, None] * x_pixel + c[None, :]
                x = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
                if stream >= 0:
                    x *= dropout_factor(
                        rate_ptr, state_ptr, stream, pixel, BLOCK_C, CHANNELS
                    )  # fmt: skip
                acc += g * x
        else:
            slot = tl.load(item + 2).to(tl.int64)
            number = tl.load(item + 9)
            y = y_ptr + slot * y_slot
            scale = tl.load(scale_ptr + number * STEP + c, mask=m_c, other=0.0)
            scale = scale.to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + number * STEP + c, mask=m_c, other=0.0)
            shift = shift.to(tl.float32)[None, :]
            for tile in range(part, tiles, parts):
                pixel = (tile * BLOCK_P + p).to(tl.int64)
                m = (pixel < pixels)[:, None] & m_c[None, :]
                at = pixel[:, None] * grad_pixel + c[None, :]
                g = tl.load(grad_ptr + at, mask=m, other=0.0).to(tl.float32)
                at = pixel[:, None] * C + c[None, :]
                acc += g * (tl.load(y + at, mask=m, other=0.0).to(tl.float32) * scale + shift)
    out = partials_ptr + (row.to(tl.int64) * parts + part) * C
    tl.store(out + c, tl.sum(acc, 0), mask=m_c)


def _parts(rows: int, pixels: int, block: int, channels: int) -> int:
    """Programs a row: enough to fill a large GPU, each with as many tiles as that leaves."""
    wanted = min(_PARTS // channels, max(16, _PROGRAMS // rows))
    return min(triton.cdiv(pixels, block), wanted)


def partial_sums(
    call: Call,
    arrays: Arrays,
    grad: Tensor,
    scale: Tensor,
    shift: Tensor,
    numbers: tuple[int, ...] | None = None,
) -> Tensor:
    """Parts of the sums, float32 ``[1 + n, parts, C]``: one launch.

    Args:
        scale, shift: ``[rows, C]``, with numbers of one stride, else contiguous.
        numbers: Row of every item; None for its place in the call.
    """
    common.check_storage(grad)
    channels, pixels = grad.shape[-1], grad[..., 0].numel()
    block_c = block_channels(channels)
    block_p = _ELEMENTS // block_c * common.TILE_SCALE
    rows = 1 + len(call.items)
    parts = _parts(rows, pixels, block_p, block_c)
    partials = torch.empty(rows, parts, channels, dtype=torch.float32, device=grad.device)
    states, strides = common.states(arrays)
    table = common.table(call, arrays, changed=None if numbers is None else {"number": numbers})
    _reduce_kernel[(rows, parts)](
        grad, arrays.y, *states, scale, shift, arrays.rate, arrays.state, table, partials,
        pixel_stride(grad), arrays.y.stride(0), *strides, pixels, parts,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, CHANNELS=arrays.channels,
        STEP=channels if numbers is None else scale.stride(0),
    )  # fmt: skip
    return partials


def reduce(
    call: Call, arrays: Arrays, grad: Tensor, scale: Tensor, shift: Tensor, sums: Tensor
) -> None:
    """``interface.Backend.reduce``: two launches."""
    sum_partials(partial_sums(call, arrays, grad, scale, shift), sums)


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_reduce_kernel)


register(
    "reduce",
    _reduce_kernel,
    reference="Reference.reduce",
    maths="sums = sum g, sum g (y scale + shift), sum g dropout(x)",
    why="16 elements a thread of 4 warps: 2 loads of 16 bytes each of g and y in flight",
    specialisations=_specialisations,
)
