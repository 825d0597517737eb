"""Weight gradients of depthwise-separable and 1x1 convolutions on the tensor cores.

    Q[t, c, o]  = sum over pixels p of r[p + t, c] dy[p, o]        t: taps of the depthwise kernel
    dW[o, c]    = sum_t d[t, c] Q[t, c, o]                         = dy' z
    dd[t, c]    = sum_o W[o, c] Q[t, c, o]                         = sum_p r[p + t, c] dz[p, c]

One product per tap gives both, so z is not recomputed and no stencil with a sum a tap runs on the
scalar units. It costs ``2 M C C k k`` operations an item, the same in every stage of a search since
M falls by 4 when C doubles. A program makes the products of ``BLOCK_K / CB`` taps for one part of
every image of its share: where a tap reads does not change from image to image, so a loop iteration
is loads, dy and the product. Partial Q lie in memory; the second kernel adds them in their order.

Reference: ``reference._separable_backward``, ``reference._one_by_one_backward``.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .common import block_channels, pixel_stride
from .gradient_rows import (
    device_table,
    load_coefficients,
    node_gradients,
    pick_gradient,
)
from .record import search_specialisations
from .registry import Specialisation, register
from .weight_tasks import Task, settings
from .weights import packed

_ELEMENTS = 1024
_REGISTERS = 128


@triton.jit(do_not_specialize=["N", "H", "W", "H_OUT", "W_OUT", "image_tiles", "chunk"])
def _weight_products_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr, y_ptr, x_ptr, coef_ptr, partials_ptr, table_ptr,
    g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, y_slot, x_slot, x_pixel,
    N, H, W, H_OUT, W_OUT, image_tiles, chunk,
    C: tl.constexpr, BLOCK_N: tl.constexpr, CX: tl.constexpr, CB: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (row of the table, part, block of o). RELU: x is not rectified yet."""
    table = table_ptr + tl.program_id(0) * 16
    part = tl.program_id(1)
    kernel, dilation, pad = tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
    p = (part % image_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = p < H_OUT * W_OUT
    k = tl.arange(0, BLOCK_K)
    tap = tl.load(table + 8) + k // CB
    place = tap * tl.load(table + 12)  # of the tap in its kernel, row by row
    channel = tl.multiple_of(tl.load(table + 10), 16) + k % CB
    row = (p // W_OUT * STRIDE)[:, None] + (place // kernel * dilation - pad)[None, :]
    col = (p % W_OUT * STRIDE)[:, None] + (place % kernel * dilation - pad)[None, :]
    m_k = (tap < tl.load(table + 9)) & (channel < CX)
    m_x = (row >= 0) & (row < H) & (col >= 0) & (col < W) & m_p[:, None] & m_k[None, :]
    x = x_ptr + tl.load(table + 4).to(tl.int64) * x_slot
    x += (row * W + col) * x_pixel + channel[None, :]  # [BLOCK_P, BLOCK_K]
    c = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = c < C
    m_y = m_p[:, None] & m_c[None, :]
    g_ptr, g_pixel = pick_gradient(
        tl.load(table + 2), tl.load(table + 3), g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr,
        g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, C,
    )  # fmt: skip
    g = g_ptr + p[:, None] * g_pixel + c[None, :]
    y = y_ptr + tl.load(table + 1).to(tl.int64) * y_slot + p[:, None] * C + c[None, :]
    c0, c1, c2 = load_coefficients(coef_ptr, tl.load(table), c, m_c, C)
    STORAGE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    first = (part // image_tiles) * chunk
    image = first.to(tl.int64)
    for _ in range(first, tl.minimum(first + chunk, N)):
        r = tl.load(x + image * (H * W * x_pixel), mask=m_x, other=0.0)
        if RELU:
            r = tl.maximum(r.to(tl.float32), 0.0).to(STORAGE)
        ours = image * (H_OUT * W_OUT)
        dy = tl.load(g + ours * g_pixel, mask=m_y, other=0.0).to(tl.float32) * c0
        dy += tl.load(y + ours * C, mask=m_y, other=0.0).to(tl.float32) * c1 + c2
        dy = dy.to(STORAGE).to(OPERAND)
        acc = tl.dot(tl.trans(r.to(OPERAND)), dy, acc, input_precision=PRECISION)
        image += 1
    rows = tl.load(table + 11) + k // CB * CX + k % CB
    out = partials_ptr + (rows.to(tl.int64) * tl.num_programs(1) + part)[:, None] * C
    tl.store(out + c[None, :], acc, mask=m_k[:, None] & m_c[None, :])


@triton.jit
def _weight_gradients_kernel(
    partials_ptr, taps_ptr, matrices_ptr, grad_ptr, table_ptr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (item, block of input channels): adds the parts of Q and contracts them."""
    table = table_ptr + tl.program_id(0) * 16
    width, parts, split = tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
    channel = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = channel < width
    o = tl.arange(0, BLOCK_C)
    m = m_x[:, None] & (o < C)[None, :]
    b = tl.arange(0, BLOCK)
    taps = tl.where(tl.program_id(1) * BLOCK_X < width, tl.load(table + 1), 0)
    is_depthwise = tl.load(table + 2) != 0
    depthwise, pointwise = tl.load(table + 3), tl.load(table + 4)
    at = pointwise + o[None, :] * width + channel[:, None]  # [BLOCK_X, BLOCK_C]
    weight = tl.load(matrices_ptr + at, mask=m, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_X, BLOCK_C], dtype=tl.float32)
    for tap in range(taps):
        row = tl.load(table).to(tl.int64) + (tap * width + channel) * parts
        acc = tl.zeros([BLOCK_X, BLOCK, BLOCK_C], dtype=tl.float32)
        for first in range(0, parts, BLOCK):
            part = first + b
            vector = (row[:, None] + part[None, :])[:, :, None]
            m_part = (part < parts)[None, :, None] & m[:, None, :]
            acc += tl.load(partials_ptr + vector * C + o[None, None, :], mask=m_part, other=0.0)
        q = tl.sum(acc, 1)
        if is_depthwise:
            to = depthwise + channel * taps + tap
            tl.store(grad_ptr + to, tl.sum(q * weight, 1), mask=m_x)
            scale = tl.load(taps_ptr + depthwise + tap * width + channel, mask=m_x, other=0.0)
            dw += q * scale[:, None]
        else:
            dw += tl.where(((o < split) == (tap == 0))[None, :], q, 0.0)
    tl.store(grad_ptr + at, dw, mask=m)


def weight_products(call: Call, arrays: Arrays, task: Task, partials: Tensor) -> None:
    """One launch: writes ``[task.vectors, C]`` float32 partial sums."""
    inputs, coef = task.inputs, task.coef
    channels, width = coef.shape[-1], inputs.shape[-1]
    chosen = task.settings
    key = ("products", channels, width, chosen.block_k, task.products)
    table = device_table(call, key, coef.device, lambda: task.rows)
    images, height, across = inputs.shape[1:4]
    grads, strides = node_gradients(arrays)
    halves = arrays.y if arrays.half_grads is None else arrays.half_grads
    output_size, storage = arrays.y.shape[2:4], inputs.dtype
    _weight_products_kernel[(len(table), task.parts, triton.cdiv(channels, chosen.block_n))](
        *grads, halves, arrays.y, inputs, coef, partials, table,
        *strides, halves.stride(0), arrays.y.stride(0), inputs.stride(0), pixel_stride(inputs[0]),
        images, height, across, *output_size, task.image_tiles, task.chunk,
        C=channels, BLOCK_N=chosen.block_n, CX=width,
        CB=min(block_channels(width), chosen.block_k), BLOCK_K=chosen.block_k,
        BLOCK_P=chosen.block_p, STRIDE=1 if tuple(output_size) == (height, across) else 2,
        RELU=not task.rectified, PRECISION=common.precision(storage),
        OPERAND=common.operand_dtype(storage), num_warps=chosen.warps, num_stages=1,
        maxnreg=_REGISTERS,
    )  # fmt: skip


def contract(call: Call, arrays: Arrays, tasks: list[Task], partials: Tensor) -> None:
    """One launch: the weight gradients of tasks whose partial sums follow one another.

    Args:
        call: Under which the table is kept.
        partials: float32 ``[vectors, C]``.
    """
    grad = arrays.weights.grad
    assert grad is not None
    channels, storage = partials.shape[-1], tasks[0].inputs.dtype
    widths = tuple(task.inputs.shape[-1] for task in tasks)
    parts = tuple(task.parts for task in tasks)

    def rows() -> list[list[int]]:
        found, begin = [], 0
        for task in tasks:
            found += task.contraction(begin, channels, arrays.channels // 2)
            begin += task.vectors
        return found

    table = device_table(call, ("contraction", channels, widths, parts), partials.device, rows)
    weights = packed(arrays.weights, storage)
    # One channel a program on a GPU: there are few. The interpreter wants few programs.
    block_c, width = block_channels(channels), max(widths)
    block_x = min(64, block_channels(width)) if common.INTERPRETED else 1
    _weight_gradients_kernel[(len(table), triton.cdiv(width, block_x))](
        partials, weights.taps, weights.matrices, grad, table,
        C=channels, BLOCK_C=block_c, BLOCK_X=block_x,
        BLOCK=_ELEMENTS // block_c * common.TILE_SCALE,
        # Left alone, the assembler aims at 32 registers for sm_80 and spills.
        maxnreg=64,
    )  # fmt: skip


def empty_products(tasks: list[Task]) -> list[Tensor]:
    """Room for the partial sums of tasks: all of them, then the part of each."""
    coef, lengths = tasks[0].coef, [task.vectors for task in tasks]
    everything = coef.new_empty(sum(lengths), coef.shape[-1])
    return [everything, *everything.split(lengths)]


def weight_gradients(call: Call, arrays: Arrays, task: Task) -> None:
    """Writes the weight gradients of items of a call: two launches."""
    everything, _ = empty_products([task])
    weight_products(call, arrays, task, everything)
    contract(call, arrays, [task], everything)


def _specialisations() -> list[Specialisation]:
    """Those that launchers record, and for sm_80 what they launch there instead."""
    found = []
    for one in search_specialisations(_weight_products_kernel, product=True):
        if one.constants["BLOCK_K"] <= 128:
            found.append(one)
            continue
        found.append(replace(one, targets=("sm_90", "sm_100", "gfx942")))
        older = settings(2, one.constants["C"], large=True, ampere=True)
        tile = {"BLOCK_K": older.block_k, "CB": min(one.constants["CB"], older.block_k)}
        constants = one.constants | tile
        found.append(replace(one, constants=constants, num_warps=older.warps, targets=("sm_80",)))
    return found


def _contraction_specialisations() -> list[Specialisation]:
    return search_specialisations(_weight_gradients_kernel, gathers=True)


register(
    "weight_products",
    _weight_products_kernel,
    reference="reference._convolution_backward",
    maths="Q[t, c, o] = sum_p r[p + t, c] dy[p, o]",
    why="see weight_gradient.Settings",
    specialisations=_specialisations,
)

register(
    "weight_gradients",
    _weight_gradients_kernel,
    reference="reference._convolution_backward",
    maths="dW = sum_t d[t] Q[t]; dd[t] = sum_o W[o] Q[t, o]",
    why="1024 partial sums at a time are two 16-byte loads a thread; few, scattered results",
    specialisations=_contraction_specialisations,
)
