"""What the backward pass writes once and reads many times: dz, rectified inputs, dP of pools.

    PRODUCT   dz = (c0 g + c1 y + c2) W           gradient of a convolution's depthwise output
    RECTIFY   r = relu(x),  v = relu(y scale + shift)     what weight gradients multiply with
    AVG, MAX  dP = sum over edges of (c0 g + c1 y + c2)   gradient of a pool that edges share;
              AVG divides by the pixels of the window, MAX writes which tap was the maximum

A register tile cannot be shifted in space: the transposed stencil reads dz from memory, where a
product for every tap would cost ten times as much. One launch for all rows of a call.

Reference: ``reference._separable_backward``, ``reference._pool_backward``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Arrays
from . import common
from .coefficients import Entering, entering, write_entering
from .common import block_channels, pixel_stride
from .gradient_rows import load_coefficients, node_gradients, pick_gradient
from .record import search_specialisations
from .registry import Specialisation, register
from .weights import packed

PRODUCT, RECTIFY, AVG, MAX = range(4)
_ELEMENTS = 2048
_PRODUCT: tl.constexpr = tl.constexpr(PRODUCT)
_RECTIFY: tl.constexpr = tl.constexpr(RECTIFY)
_MAX: tl.constexpr = tl.constexpr(MAX)
# Columns of the table. "begin" and "count": rows with number and node of every edge of a pool.
COLUMNS = (
    "op", "number", "slot", "node", "half", "matrix", "out", "low", "high", "input", "begin",
    "count", "arg", "source", "entering",
)  # fmt: skip


@triton.jit
def _rectify(
    x_ptr, y_ptr, out_ptr, scale_ptr, shift_ptr, number, slot, x_pixel, y_slot, x_pixels, tile,
    tiles, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """relu(x) or, SECOND, of a normalised slot; every ``tiles``-th tile."""
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tl.arange(0, BLOCK_P)
    if SECOND:
        source = y_ptr + slot.to(tl.int64) * y_slot
        step = C
        scale = tl.load(scale_ptr + number * C + c, mask=m_c, other=0.0)[None, :]
        shift = tl.load(shift_ptr + number * C + c, mask=m_c, other=0.0)[None, :]
    else:
        source = x_ptr
        step = x_pixel
    for t in range(tile, tl.cdiv(x_pixels, BLOCK_P), tiles):
        pixel = (t * BLOCK_P + p).to(tl.int64)
        m = (pixel < x_pixels)[:, None] & m_c[None, :]
        x = tl.load(source + pixel[:, None] * step + c[None, :], mask=m, other=0.0).to(tl.float32)
        if SECOND:
            x = x * scale + shift
        x = tl.maximum(x, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + pixel[:, None] * C + c[None, :], x, mask=m)


@triton.jit
def _largest_tap(
    x_ptr, x_pixel, pixel, m_p, c, m_c, H, W, H_OUT, W_OUT, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Tap 0..8 of the first maximum of every 3x3 window, fp32 [BLOCK_P, BLOCK_C]."""
    w = (pixel % W_OUT).to(tl.int32) * STRIDE
    h = ((pixel // W_OUT) % H_OUT).to(tl.int32) * STRIDE
    image = (pixel // (W_OUT * H_OUT)) * H * W
    best = tl.full([BLOCK_P, BLOCK_C], float("-inf"), dtype=tl.float32)
    arg = tl.full([BLOCK_P, BLOCK_C], 4.0, dtype=tl.float32)
    for tap in range(9):
        row = h + tap // 3 - 1
        col = w + tap % 3 - 1
        m = m_p & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        at = (image + row * W + col) * x_pixel
        x = tl.load(
            x_ptr + at[:, None] + c[None, :], mask=m[:, None] & m_c[None, :], other=float("-inf")
        ).to(tl.float32)
        larger = x > best
        best = tl.where(larger, x, best)
        arg = tl.where(larger, tap * 1.0, arg)
    return arg


@triton.jit(do_not_specialize=["parts", "count", "pixels", "x_pixels", "H", "W", "H_OUT", "W_OUT"])
def _output_gradient_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr, y_ptr, x_ptr, x1_ptr, coef_ptr, scale_ptr, shift_ptr,
    matrices_ptr, out_ptr, rectified_ptr, table_ptr,
    entering_ptr, partials_ptr, norms_ptr, alphas_ptr, grad_alphas_ptr, parts, count,
    g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, y_slot, x_pixel, rectified_slot,
    pixels, x_pixels, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    SECOND: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    ENTERING: tl.constexpr, TRAINING: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (row of the table, tile). SECOND: of second halves, whose input is a slot.

    x1 is state 1, x any other. ENTERING: there are no coefficients yet, they are computed and
    written; rows of products say which of ``count`` rows at ``entering`` is theirs.
    """
    table = table_ptr + tl.program_id(0) * 16
    tile = tl.program_id(1)
    op = tl.load(table)
    number = tl.load(table + 1)
    slot = tl.load(table + 2)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    pixel = (tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    m_p = pixel < pixels
    m = m_p[:, None] & m_c[None, :]
    at = pixel[:, None] * C + c[None, :]
    out = out_ptr + tl.load(table + 6).to(tl.int64) * y_slot
    STORAGE: tl.constexpr = out_ptr.dtype.element_ty
    x_ptr = tl.where(tl.load(table + 13) == 1, x1_ptr, x_ptr)
    if op == _RECTIFY:
        _rectify(
            x_ptr, y_ptr, rectified_ptr + tl.load(table + 6).to(tl.int64) * rectified_slot,
            scale_ptr, shift_ptr, number, tl.load(table + 9), x_pixel, y_slot, x_pixels, tile,
            tl.num_programs(1), C, BLOCK_C, BLOCK_P, SECOND,
        )  # fmt: skip
    elif op == _PRODUCT:
        g_ptr, g_pixel = pick_gradient(
            tl.load(table + 3), tl.load(table + 4), g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr,
            g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, C,
        )  # fmt: skip
        if ENTERING:
            c0, c1, c2, _ = entering(
                entering_ptr + tl.load(table + 14) * 16, partials_ptr, norms_ptr, alphas_ptr, parts,
                pixels, c, m_c, C, PARTS, TRAINING,
            )  # fmt: skip
            c0, c1, c2 = c0[None, :], c1[None, :], c2[None, :]
        else:
            c0, c1, c2 = load_coefficients(coef_ptr, number, c, m_c, C)
        y = tl.load(y_ptr + slot.to(tl.int64) * y_slot + at, mask=m, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + pixel[:, None] * g_pixel + c[None, :], mask=m, other=0.0)
        dy = g.to(tl.float32) * c0 + (y * c1 + c2)
        low, high = tl.load(table + 7), tl.load(table + 8)
        dy = tl.where(((c >= low) & (c < high))[None, :], dy, 0.0)
        matrix = tl.load(
            matrices_ptr + tl.multiple_of(tl.load(table + 5), 16) + c[:, None] * C + c[None, :],
            mask=m_c[:, None] & m_c[None, :],
            other=0.0,
        ).to(OPERAND)  # [C out, C in]
        dz = tl.dot(dy.to(STORAGE).to(OPERAND), matrix, input_precision=PRECISION)
        tl.store(out + at, dz.to(STORAGE), mask=m)
    elif not SECOND:
        y = tl.load(y_ptr + slot.to(tl.int64) * y_slot + at, mask=m, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        begin = tl.load(table + 10)
        for row in range(begin, begin + tl.load(table + 11)):
            edge = table_ptr + row * 16
            g_ptr, g_pixel = pick_gradient(
                tl.load(edge + 3), -1, g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr,
                g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, C,
            )  # fmt: skip
            c0, c1, c2 = load_coefficients(coef_ptr, tl.load(edge + 1), c, m_c, C)
            g = tl.load(g_ptr + pixel[:, None] * g_pixel + c[None, :], mask=m, other=0.0)
            total += g.to(tl.float32) * c0 + (y * c1 + c2)
        if op == _MAX:
            arg = _largest_tap(
                x_ptr, x_pixel, pixel, m_p, c, m_c, H, W, H_OUT, W_OUT, BLOCK_P, BLOCK_C, STRIDE
            )  # fmt: skip
            args = out_ptr + tl.load(table + 12).to(tl.int64) * y_slot
            tl.store(args + at, arg.to(STORAGE), mask=m)
        else:
            w = (pixel % W_OUT).to(tl.int32) * STRIDE
            h = ((pixel // W_OUT) % H_OUT).to(tl.int32) * STRIDE
            across = tl.minimum(w + 2, W) - tl.maximum(w - 1, 0)
            down = tl.minimum(h + 2, H) - tl.maximum(h - 1, 0)
            total *= (1.0 / (across * down).to(tl.float32))[:, None]
        tl.store(out + at, total.to(STORAGE), mask=m)
    if ENTERING:
        write_entering(
            entering_ptr, count, partials_ptr, norms_ptr, alphas_ptr, coef_ptr, grad_alphas_ptr,
            parts, pixels, c, m_c, C, PARTS, TRAINING,
        )  # fmt: skip


def output_gradient(
    arrays: Arrays,
    table: Tensor,
    rows: int,
    out: Tensor,
    rectified: Tensor,
    x: Tensor,
    output_size: tuple[int, int],
    coef: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    enter: Entering | None = None,
) -> None:
    """One launch over the first ``rows`` rows of a table.

    Args:
        table: int32 ``[n, 16]``, see ``COLUMNS``.
        out: Gradients, ``[n, N, H, W, C]``, written.
        rectified: ``[n, N, Hx, Wx, C]``, written where the table asks.
        x: The state, ``[N, Hx, Wx, C]``; of second halves any slot.
        output_size: H and W.
        coef: float32 ``[items, 3, C]``; with ``enter`` written.
        scale, shift: float32 ``[items, C]`` of what second halves read; else None.
        other: State 1, if the table has rows of two states; like x.
        enter: What coefficients are made of, if there are none yet.
    """
    channels, pixels = out.shape[-1], out[0, ..., 0].numel()
    height, width = x.shape[1:3]
    block_c = block_channels(channels)
    block_p = max(16, _ELEMENTS // block_c) * common.TILE_SCALE
    grads, strides = node_gradients(arrays)
    halves = out if arrays.half_grads is None else arrays.half_grads
    second = scale is not None
    warps = 8 if block_c >= 64 and out.element_size() == 4 else 4
    enters = (coef, coef, coef, coef, coef)
    if enter is not None:
        enters = (enter.table, enter.partials, enter.norms, enter.alphas, enter.grad_alphas)
    _output_gradient_kernel[(rows, triton.cdiv(pixels, block_p))](
        *grads, halves, arrays.y, x, x if other is None else other, coef,
        scale if second else coef, shift if second else coef,
        packed(arrays.weights, out.dtype).matrices, out, rectified, table,
        *enters, enters[1].shape[1], len(enters[0]),
        *strides, halves.stride(0), arrays.y.stride(0), pixel_stride(x), rectified.stride(0),
        pixels, x[..., 0].numel(), height, width, *output_size,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p,
        STRIDE=1 if output_size == (height, width) else 2, SECOND=second,
        PRECISION=common.precision(out.dtype), OPERAND=common.operand_dtype(out.dtype),
        ENTERING=enter is not None, TRAINING=enter is not None and enter.training,
        # 16 bytes a thread.
        PARTS=128 * warps // block_c * common.TILE_SCALE, num_warps=warps,
    )  # fmt: skip


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_output_gradient_kernel, product=True)


register(
    "output_gradient",
    _output_gradient_kernel,
    reference="reference._separable_backward",
    maths="dz = (c0 g + c1 y + c2) W; relu(x); pool gradients",
    why="16 elements a thread of 4 warps; float32 products at C=64 need 8 for 128 registers",
    specialisations=_specialisations,
)
