"""Gradient of a preprocessing 1x1 convolution or factorized reduce to its input, which is wider.

    dx[p] = [x[p] > 0] (dy W)[p]                                           1x1
    dx[2q] = [x > 0] (dy W_even)[q],  dx[2q + 1] = [x > 0] (dy W_odd)[q]   factorized, 0 elsewhere

A program makes a block of channels for a tile of output pixels; of a factorized reduce it writes
the four input pixels that belong to each.

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
from .gradient_rows import load_coefficients
from .record import search_specialisations
from .registry import Specialisation, register
from .weights import packed

# Input channels, and registers, of a program.
_BLOCK_N, _REGISTERS = 32, 128


@triton.jit
def _masked_store(
    value, x_ptr, out_ptr, incoming_ptr, pixel, m, k, x_pixel, incoming_pixel, CX,
    INCOMING: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + pixel[:, None] * x_pixel + k[None, :], mask=m, other=0.0).to(tl.float32)
    value = tl.where(x > 0, value, 0.0)
    if INCOMING:
        at = pixel[:, None] * incoming_pixel + k[None, :]
        value += tl.load(incoming_ptr + at, mask=m, other=0.0).to(tl.float32)
    at = pixel[:, None] * CX + k[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["pixels", "H", "W", "H_OUT", "W_OUT", "split"])
def _pointwise_backward_kernel(
    grad_ptr, grad1_ptr, y_ptr, y1_ptr, x_ptr, x1_ptr, coef_ptr, matrix_ptr, incoming_ptr,
    out_ptr, out1_ptr,
    grad_pixel, grad1_pixel, y_pixel, y1_pixel, x_pixel, x1_pixel, incoming_pixel,
    further, CX, CX1, pixels, H, W, H_OUT, W_OUT, split,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    FACTORIZED: tl.constexpr, WIDTH: tl.constexpr, INCOMING: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (tile of output pixels, block of input channels, input): two inputs, or one that may
    be FACTORIZED, of WIDTH channels then. further: from the first matrix to the second.
    """
    if FACTORIZED:
        CX = WIDTH  # not known when compiled, it takes registers that spill
    else:
        second = tl.program_id(2) == 1
        coef_ptr += tl.program_id(2) * (3 * C)
        grad_ptr = tl.where(second, grad1_ptr, grad_ptr)
        y_ptr = tl.where(second, y1_ptr, y_ptr)
        x_ptr = tl.where(second, x1_ptr, x_ptr)
        out_ptr = tl.where(second, out1_ptr, out_ptr)
        grad_pixel = tl.multiple_of(tl.where(second, grad1_pixel, grad_pixel), 16)
        y_pixel = tl.multiple_of(tl.where(second, y1_pixel, y_pixel), 16)
        x_pixel = tl.multiple_of(tl.where(second, x1_pixel, x_pixel), 16)
        CX = tl.multiple_of(tl.where(second, CX1, CX), 16)
        matrix_ptr += tl.multiple_of(tl.where(second, further, 0), 16)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = k < CX
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    m_p = pixel < pixels
    if not FACTORIZED:
        # Inputs may differ in channels: of the narrower one, blocks behind the last have no pixel.
        m_p = m_p & (tl.program_id(1) * BLOCK_N < CX)
    m = m_p[:, None] & m_c[None, :]
    c0, c1, c2 = load_coefficients(coef_ptr, 0, c, m_c, C)
    y = tl.load(y_ptr + pixel[:, None] * y_pixel + c[None, :], mask=m, other=0.0)
    g = tl.load(grad_ptr + pixel[:, None] * grad_pixel + c[None, :], mask=m, other=0.0)
    dy = g.to(tl.float32) * c0 + (y.to(tl.float32) * c1 + c2)
    STORAGE: tl.constexpr = out_ptr.dtype.element_ty
    dy = dy.to(STORAGE).to(OPERAND)
    matrix = tl.load(
        matrix_ptr + c[:, None] * CX + k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0
    ).to(OPERAND)  # [C, BLOCK_N]
    if FACTORIZED:
        zero = tl.zeros([BLOCK_C, BLOCK_N], dtype=OPERAND)
        first = (c < split)[:, None]
        even = tl.dot(dy, tl.where(first, matrix, zero), input_precision=PRECISION)
        odd = tl.dot(dy, tl.where(first, zero, matrix), input_precision=PRECISION)
        w = pixel % W_OUT * 2
        h = (pixel // W_OUT) % H_OUT * 2
        target = (pixel // (W_OUT * H_OUT) * H + h) * W + w
        right, below = m_p & (w + 1 < W), m_p & (h + 1 < H)
        nothing = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        _masked_store(
            even, x_ptr, out_ptr, incoming_ptr, target, m_p[:, None] & m_k[None, :], k, x_pixel,
            incoming_pixel, CX, INCOMING,
        )  # fmt: skip
        _masked_store(
            nothing, x_ptr, out_ptr, incoming_ptr, target + 1, right[:, None] & m_k[None, :], k,
            x_pixel, incoming_pixel, CX, INCOMING,
        )  # fmt: skip
        _masked_store(
            nothing, x_ptr, out_ptr, incoming_ptr, target + W, below[:, None] & m_k[None, :], k,
            x_pixel, incoming_pixel, CX, INCOMING,
        )  # fmt: skip
        _masked_store(
            odd, x_ptr, out_ptr, incoming_ptr, target + W + 1,
            (right & below)[:, None] & m_k[None, :], k, x_pixel, incoming_pixel, CX, INCOMING,
        )  # fmt: skip
    else:
        dx = tl.dot(dy, matrix, input_precision=PRECISION)
        _masked_store(
            dx, x_ptr, out_ptr, incoming_ptr, pixel, m_p[:, None] & m_k[None, :], k, x_pixel,
            incoming_pixel, CX, INCOMING,
        )  # fmt: skip


def _block(element: int, block_c: int) -> int:
    """Pixels of a tile by bytes of an element: more spill, fewer make accesses narrow."""
    fewest = 64 if block_c == 16 else 16
    return (fewest if element == 4 else 32) * common.TILE_SCALE


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


def pointwise_backward(sides: list[Side], coef: Tensor, incoming: Tensor | None) -> None:
    """One launch for one input, or for both.

    Args:
        sides: Two, or one that may be a factorized reduce, which with another spilled 56 bytes.
        coef: float32 ``[sides, 3, C]``.
        incoming: Gradient to add to a single one.
    """
    first, last = sides[0], sides[-1]
    item, arrays = first.call.items[0], first.arrays
    (grad, y, x, out), second = first.pointers(), last.pointers()
    block_c, width = block_channels(y.shape[-1]), max(side.x.shape[-1] for side in sides)
    factorized = common.kind(item) == common.FACTORIZED
    block_p = _block(out.element_size(), block_c)
    pixels, extra = y[..., 0].numel(), out if incoming is None else incoming
    where = arrays.weights.layout
    offsets = [where.offsets[side.call.items[0].pointwise] for side in (first, last)]
    grid = (triton.cdiv(pixels, block_p), triton.cdiv(width, _BLOCK_N), len(sides))
    _pointwise_backward_kernel[grid](
        grad, second[0], y, second[1], x, second[2], coef,
        packed(arrays.weights, out.dtype).matrices[offsets[0] :], extra, out, second[3],
        *(pixel_stride(one) for pair in zip((grad, y, x), second[:3], strict=True) for one in pair),
        pixel_stride(extra), offsets[1] - offsets[0], x.shape[-1], last.x.shape[-1],
        pixels, *x.shape[1:3], *y.shape[1:3], where.padded[item.pointwise][0],
        C=y.shape[-1], BLOCK_C=block_c, BLOCK_N=_BLOCK_N, BLOCK_P=block_p,
        FACTORIZED=factorized, WIDTH=x.shape[-1] if factorized else 0,
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
