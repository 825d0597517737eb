"""Gradient of preprocessing, 1x1 convolutions or a factorized reduce, to the wider inputs.

    dx[p] = [x[p] > 0] (dy W)[p]                                           1x1
    dx[2q] = [x > 0] (dy W_even)[q],  dx[2q + 1] = [x > 0] (dy W_odd)[q]   factorized, 0 elsewhere

A program makes a block of channels for a tile of output pixels of one part: a 1x1 convolution, or
the even or odd pixels of a factorized reduce, with zeros for those between them.

Reference: ``reference._one_by_one_backward``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .common import block_channels, pixel_stride
from .gradient_rows import device_table, load_coefficients
from .record import search_specialisations
from .registry import Specialisation, register
from .weights import packed

# Input channels, and registers, of a program.
_BLOCK_N, _REGISTERS = 32, 128


@triton.jit(do_not_specialize=["pixels", "H", "W", "H_OUT", "W_OUT"])
def _pointwise_backward_kernel(
    grad_ptr, grad1_ptr, y_ptr, y1_ptr, x_ptr, x1_ptr, coef_ptr, matrices_ptr, incoming_ptr,
    out_ptr, out1_ptr, table_ptr,
    grad_pixel, grad1_pixel, y_pixel, y1_pixel, x_pixel, x1_pixel, incoming_pixel,
    CX, CX1, pixels, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    INCOMING: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile of output pixels, block of input channels, row of the table).

    A row: input (0 or 1), its row of coefficients, its matrix, the channels of y that take part,
    distance of pixels (1 or 2), and whether they are the odd ones. H, W: of a factorized input.
    """
    row = table_ptr + tl.program_id(2) * 16
    second = tl.load(row) == 1
    grad_ptr = tl.where(second, grad1_ptr, grad_ptr)
    y_ptr = tl.where(second, y1_ptr, y_ptr)
    x_ptr = tl.where(second, x1_ptr, x_ptr)
    out_ptr = tl.where(second, out1_ptr, out_ptr)
    grad_pixel = tl.multiple_of(tl.where(second, grad1_pixel, grad_pixel), 16)
    y_pixel = tl.multiple_of(tl.where(second, y1_pixel, y_pixel), 16)
    x_pixel = tl.multiple_of(tl.where(second, x1_pixel, x_pixel), 16)
    CX = tl.multiple_of(tl.where(second, CX1, CX), 16)
    matrix_ptr = matrices_ptr + tl.multiple_of(tl.load(row + 2), 16)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = k < CX
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    # Inputs may differ in channels: of the narrower one, blocks behind the last have no pixel.
    m_p = (pixel < pixels) & (tl.program_id(1) * BLOCK_N < CX)
    m = m_p[:, None] & m_c[None, :]
    c0, c1, c2 = load_coefficients(coef_ptr, tl.load(row + 1), c, m_c, C)
    y = tl.load(y_ptr + pixel[:, None] * y_pixel + c[None, :], mask=m, other=0.0)
    g = tl.load(grad_ptr + pixel[:, None] * grad_pixel + c[None, :], mask=m, other=0.0)
    dy = g.to(tl.float32) * c0 + (y.to(tl.float32) * c1 + c2)
    STORAGE: tl.constexpr = out_ptr.dtype.element_ty
    dy = dy.to(STORAGE).to(OPERAND)
    takes_part = m_c & (c >= tl.load(row + 3)) & (c < tl.load(row + 4))
    matrix = tl.load(
        matrix_ptr + c[:, None] * CX + k[None, :],
        mask=takes_part[:, None] & m_k[None, :],
        other=0.0,
    ).to(OPERAND)  # [C, BLOCK_N]
    dx = tl.dot(dy, matrix, input_precision=PRECISION)
    odd, target = tl.load(row + 6), pixel
    if tl.load(row + 5) == 2:
        w = pixel % W_OUT * 2 + odd
        h = (pixel // W_OUT) % H_OUT * 2 + odd
        target = (pixel // (W_OUT * H_OUT) * H + h) * W + w
        beside = target + (1 - 2 * odd)
        m_beside = m_p & (h < H) & (w + 1 - 2 * odd < W)
        m_beside = m_beside[:, None] & m_k[None, :]
        nothing = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        if INCOMING:
            at = beside[:, None] * incoming_pixel + k[None, :]
            nothing += tl.load(incoming_ptr + at, mask=m_beside, other=0.0).to(tl.float32)
        tl.store(out_ptr + beside[:, None] * CX + k[None, :], nothing.to(STORAGE), mask=m_beside)
        m_p = m_p & (h < H) & (w < W)
    m = m_p[:, None] & m_k[None, :]
    x = tl.load(x_ptr + target[:, None] * x_pixel + k[None, :], mask=m, other=0.0)
    dx = tl.where(x.to(tl.float32) > 0, dx, 0.0)
    if INCOMING:
        at = target[:, None] * incoming_pixel + k[None, :]
        dx += tl.load(incoming_ptr + at, mask=m, other=0.0).to(tl.float32)
    tl.store(out_ptr + target[:, None] * CX + k[None, :], dx.to(STORAGE), mask=m)


def _block(element: int, block_c: int) -> int:
    """Pixels of a tile by bytes of an element: more spill, fewer make accesses narrow."""
    if block_c == 16:
        return 64 * common.TILE_SCALE
    return (16 if element == 4 else 32) * common.TILE_SCALE


@dataclass(frozen=True)
class Side:
    """One input of a cell.

    Attributes:
        call: Its 1x1 convolution or factorized reduce.
        arrays: ``y``: the state; ``grads``: its gradient, by node.
        x: The input, ``[N, Hx, Wx, Cx]``.
        out: Its gradient, like x, written.
    """

    call: Call
    arrays: Arrays
    x: Tensor
    out: Tensor

    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient of the state, state, input and its gradient."""
        item = self.call.items[0]
        return self.arrays.grads[item.node], self.arrays.y[item.slot], self.x, self.out


def _rows(sides: list[Side], offsets: list[int], channels: int, half: int) -> list[list[int]]:
    """The table of the kernel."""
    found = []
    for number, side in enumerate(sides):
        item = side.call.items[0]
        head = [number, number, offsets[item.pointwise]]
        if common.kind(item) == common.FACTORIZED:
            found += [[*head, 0, half, 2, 0], [*head, half, channels, 2, 1]]
        else:
            found.append([*head, 0, channels, 1, 0])
    return found


def pointwise_backward(
    call: Call, sides: list[Side], coef: Tensor, incoming: Tensor | None
) -> None:
    """One launch.

    Args:
        call: Under which the table is kept.
        sides: One or two, of which one may be a factorized reduce.
        coef: float32 ``[sides, 3, C]``.
        incoming: Gradient to add to a single one.
    """
    first, last = sides[0], sides[-1]
    arrays = first.arrays
    (grad, y, x, out), second = first.pointers(), last.pointers()
    channels, where = y.shape[-1], arrays.weights.layout
    block_c, width = block_channels(channels), max(side.x.shape[-1] for side in sides)
    block_p = _block(out.element_size(), block_c)
    pixels, extra = y[..., 0].numel(), out if incoming is None else incoming
    factorized = [s for s in sides if common.kind(s.call.items[0]) == common.FACTORIZED]
    size = (factorized or sides)[0].x.shape[1:3]

    def rows() -> list[list[int]]:
        return _rows(sides, where.offsets, channels, arrays.channels // 2)

    key = ("pointwise", channels, *(side.call.items[0].source for side in sides))
    table = device_table(call, key, coef.device, rows)
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(width, _BLOCK_N), len(table))
    _pointwise_backward_kernel[grid](
        grad, second[0], y, second[1], x, second[2], coef,
        packed(arrays.weights, out.dtype).matrices, extra, out, second[3], table,
        *(pixel_stride(one) for pair in zip((grad, y, x), second[:3], strict=True) for one in pair),
        pixel_stride(extra), x.shape[-1], last.x.shape[-1], pixels, *size, *y.shape[1:3],
        C=channels, BLOCK_C=block_c, BLOCK_N=_BLOCK_N, BLOCK_P=block_p,
        INCOMING=incoming is not None, PRECISION=common.precision(out.dtype),
        OPERAND=common.operand_dtype(out.dtype), num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_pointwise_backward_kernel, product=True)


register(
    "pointwise_backward",
    _pointwise_backward_kernel,
    reference="reference._one_by_one_backward",
    maths="dx = [x > 0] dy W",
    why="32 pixels and input channels a program, fp32 16 from C=32 on: more spill",
    specialisations=_specialisations,
)
