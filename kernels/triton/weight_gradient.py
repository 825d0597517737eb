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

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .common import block_channels
from .gradient_rows import (
    device_table,
    load_coefficients,
    node_gradients,
    pick_gradient,
)
from .record import search_specialisations
from .registry import Specialisation, register
from .weight_tasks import Division, Task, make_division, settings
from .weights import packed

_ELEMENTS = 1024
_REGISTERS = 128


@triton.jit
def _bits(word, place: tl.constexpr, count: tl.constexpr):
    """A number of a table's word, see ``weight_tasks._word``."""
    return (word >> place) & ((1 << count) - 1)


@triton.jit
def _sum_of_products(
    x, m_x, x_image, g, g_pixel, y, m_y, y_image, c0, c1, c2, first, last,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """sum r' dy over images. x, g, y: pointers into image 0. RELU: x is not rectified yet."""
    STORAGE: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    image = first.to(tl.int64)
    for _ in range(first, last):
        r = tl.load(x + image * x_image, mask=m_x, other=0.0)
        if RELU:
            r = tl.maximum(r.to(tl.float32), 0.0).to(STORAGE)
        ours = image * y_image
        dy = tl.load(g + ours * g_pixel, mask=m_y, other=0.0).to(tl.float32) * c0
        dy += tl.load(y + ours * C, mask=m_y, other=0.0).to(tl.float32) * c1 + c2
        dy = dy.to(STORAGE).to(OPERAND)
        acc = tl.dot(tl.trans(r.to(OPERAND)), dy, acc, input_precision=PRECISION)
        image += 1
    return acc


@triton.jit(do_not_specialize=["N", "chunk"])
def _weight_products_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr, half_ptr, y_ptr, stack_ptr, large_ptr,
    grads_ptr, state_ptr, state1_ptr, input_ptr, input1_ptr,
    coef_ptr, partials_ptr, programs_ptr, tasks_ptr,
    g0_pixel, g1_pixel, g2_pixel, g3_pixel, half_slot, y_slot, grads_slot, N, chunk,
    C: tl.constexpr, BLOCK_N: tl.constexpr, CB: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (row of the first table, block of o): pixels of one part for one block of Q.

    The second table has a row a task. Of tasks of the inputs, dy is that of their state.
    """
    table = programs_ptr + tl.program_id(0) * 16
    items, geometry, rest = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    task = tasks_ptr + _bits(rest, 12, 4) * 16
    flags, width = tl.load(task), tl.multiple_of(tl.load(task + 1), 16)
    source, stride = _bits(flags, 0, 2), _bits(flags, 3, 2)
    x_pixel = tl.multiple_of(tl.load(task + 2), 16)
    before, after = tl.load(task + 3), tl.load(task + 4)
    H, W, H_OUT, W_OUT = (
        _bits(before, 0, 15), _bits(before, 15, 16), _bits(after, 0, 15), _bits(after, 15, 16)
    )  # fmt: skip
    kernel, dilation = _bits(geometry, 0, 4), _bits(geometry, 4, 4)
    pad, spread = _bits(geometry, 8, 4), _bits(geometry, 12, 4)
    share = tl.load(table + 4)
    first = _bits(share, 15, 16)
    p = _bits(share, 0, 15) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = p < H_OUT * W_OUT
    k = tl.arange(0, BLOCK_K)
    # Groups of a row are taps, or blocks of input channels.
    blocks = _bits(geometry, 28, 1)
    tap = _bits(geometry, 16, 6) + k // CB * (1 - blocks)
    channel = tl.multiple_of(_bits(rest, 16, 12) * 16, 16) + k % CB
    channel += k // CB * tl.multiple_of(blocks * CB, 16)
    place = tap * spread  # of the tap in its kernel, row by row
    row = (p // W_OUT * stride)[:, None] + (place // kernel * dilation - pad)[None, :]
    col = (p % W_OUT * stride)[:, None] + (place % kernel * dilation - pad)[None, :]
    m_k = (tap < _bits(geometry, 22, 6)) & (channel < width)
    m_x = (row >= 0) & (row < H) & (col >= 0) & (col < W) & m_p[:, None] & m_k[None, :]
    x_image = H * W * x_pixel
    x = tl.where(source == 0, stack_ptr, large_ptr)
    x = tl.where(source == 2, input_ptr, tl.where(source == 3, input1_ptr, x))
    x += _bits(items, 20, 10).to(tl.int64) * N * x_image
    x += (row * W + col) * x_pixel + channel[None, :]  # [BLOCK_P, BLOCK_K]
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = c < C
    m_y = m_p[:, None] & m_c[None, :]
    gradient = _bits(rest, 0, 12)  # of a node, or from 4 on of a half
    g_ptr, g_pixel = pick_gradient(
        gradient, gradient - 4, g0_ptr, g1_ptr, g2_ptr, g3_ptr,
        tl.where(source >= 2, grads_ptr, half_ptr), g0_pixel, g1_pixel, g2_pixel, g3_pixel,
        tl.multiple_of(tl.where(source >= 2, grads_slot, half_slot), 16), C,
    )  # fmt: skip
    y = tl.where(source == 2, state_ptr, tl.where(source == 3, state1_ptr, y_ptr))
    y += _bits(items, 10, 10).to(tl.int64) * y_slot + p[:, None] * C + c[None, :]
    g = g_ptr + p[:, None] * g_pixel + c[None, :]
    c0, c1, c2 = load_coefficients(coef_ptr, _bits(items, 0, 10), c, m_c, C)
    last = tl.minimum(first + chunk, N)
    y_image = H_OUT * W_OUT
    if _bits(flags, 2, 1):
        acc = _sum_of_products(
            x, m_x, x_image, g, g_pixel, y, m_y, y_image, c0, c1, c2, first, last,
            C, BLOCK_K, BLOCK_N, True, PRECISION, OPERAND,
        )  # fmt: skip
    else:
        acc = _sum_of_products(
            x, m_x, x_image, g, g_pixel, y, m_y, y_image, c0, c1, c2, first, last,
            C, BLOCK_K, BLOCK_N, False, PRECISION, OPERAND,
        )  # fmt: skip
    # Vectors of a channel, one a part, follow one another.
    rows = k // CB * tl.where(blocks == 1, CB, width) + k % CB
    vectors = tl.load(table + 3) + rows.to(tl.int64) * tl.load(task + 5)
    out = partials_ptr + vectors[:, None] * C + c[None, :]
    tl.store(out, acc, mask=m_k[:, None] & m_c[None, :])


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


@dataclass(frozen=True)
class Reads:
    """What the items of a launch read.

    Attributes:
        stack: ``[n, N, H, W, C]`` of the outputs' shape, or the only array that is read.
        large: ``[2, N, 2 H, 2 W, C]``, states of a reduction cell.
        inputs: Of the cell.
        states: What preprocessing makes of them.
        state_grads: Gradients of the states, ``[2, N, H, W, C]``.
    """

    stack: Tensor
    large: Tensor
    inputs: tuple[Tensor, Tensor]
    states: tuple[Tensor, Tensor]
    state_grads: Tensor

    @staticmethod
    def only(inputs: Tensor) -> Reads:
        """Of items that all read one stack."""
        return Reads(inputs, inputs, (inputs, inputs), (inputs, inputs), inputs)


def weight_products(
    call: Call, arrays: Arrays, division: Division, reads: Reads, coef: Tensor, partials: Tensor
) -> None:
    """One launch: writes ``[division.vectors, C]`` float32 partial sums.

    Args:
        call: Under which the tables are kept.
        coef: float32 ``[rows, 3, C]``.
    """
    channels, storage, chosen = coef.shape[-1], reads.stack.dtype, division.settings
    programs = device_table(call, ("products", division), coef.device, lambda: division.programs)
    tasks = device_table(call, ("tasks", division), coef.device, lambda: division.heads)
    grads, strides = node_gradients(arrays)
    halves = arrays.y if arrays.half_grads is None else arrays.half_grads
    _weight_products_kernel[(len(programs), triton.cdiv(channels, chosen.block_n))](
        *grads, halves, arrays.y, reads.stack, reads.large, reads.state_grads, *reads.states,
        *reads.inputs, coef, partials, programs, tasks,
        *strides, halves.stride(0), arrays.y.stride(0), reads.state_grads.stride(0),
        reads.stack.shape[1], division.chunk,
        C=channels, BLOCK_N=chosen.block_n, CB=min(block_channels(channels), chosen.block_k),
        BLOCK_K=chosen.block_k, BLOCK_P=chosen.block_p, PRECISION=common.precision(storage),
        OPERAND=common.operand_dtype(storage), num_warps=chosen.warps, num_stages=1,
        maxnreg=_REGISTERS,
    )  # fmt: skip


def contract(call: Call, arrays: Arrays, division: Division, partials: Tensor) -> None:
    """One launch: the weight gradients from partial sums, float32 ``[vectors, C]``."""
    grad = arrays.weights.grad
    assert grad is not None
    channels = partials.shape[-1]
    table = device_table(
        call, ("contraction", division), partials.device, lambda: division.contraction
    )
    weights = packed(arrays.weights, arrays.y.dtype)
    # One channel a program on a GPU: there are few. The interpreter wants few programs.
    block_c, width = block_channels(channels), division.width
    block_x, block = 1, _ELEMENTS // block_c
    if common.INTERPRETED:
        block_x = min(64, block_channels(width))
        block = min(block, triton.next_power_of_2(division.parts))
    _weight_gradients_kernel[(len(table), triton.cdiv(width, block_x))](
        partials, weights.taps, weights.matrices, grad, table,
        C=channels, BLOCK_C=block_c, BLOCK_X=block_x,
        BLOCK=block,
        # Left alone, the assembler aims at 32 registers for sm_80 and spills.
        maxnreg=64,
    )  # fmt: skip


def weight_gradients(call: Call, arrays: Arrays, task: Task, inputs: Tensor, coef: Tensor) -> None:
    """Writes the weight gradients of items of a call that read ``inputs``: two launches."""
    division = make_division(arrays, (task,))
    partials = coef.new_empty(division.vectors, coef.shape[-1])
    weight_products(call, arrays, division, Reads.only(inputs), coef, partials)
    contract(call, arrays, division, partials)


def _specialisations() -> list[Specialisation]:
    """Those that launchers record, and for sm_80 what they launch there instead."""
    found = []
    for recorded in search_specialisations(_weight_products_kernel, product=True):
        rows = recorded.constants["BLOCK_K"]
        one = replace(recorded, note=f"{rows} rows")
        if rows <= 128:
            found.append(one)
            continue
        found.append(replace(one, targets=("sm_90", "sm_100", "gfx942")))
        older = settings(2, one.constants["C"], large=True, ampere=True)
        tile = {"BLOCK_K": older.block_k, "CB": min(one.constants["CB"], older.block_k)}
        found.append(
            replace(
                one, constants=one.constants | tile, num_warps=older.warps, targets=("sm_80",),
                note=f"{older.block_k} rows",
            )
        )  # fmt: skip
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
