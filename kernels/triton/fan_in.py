"""Backward of everything that leaves a state, by the kernels of four other files and its own.

    dz = dy W of every convolution; relu(x); dP of shared pools           output_gradient.py
    D_k = sum over items of group k of (d transposed * dz), of pools      transposed.py
    dx = incoming + [x > 0] (sum of D_k of convolutions + W' dy of factorized reduces)
       + D_k of pools + sum of factor dropout(g) over skips               the kernel here
    dW, dd                                                                weight_gradient.py

Preprocessing (1x1 and wide) has ``pointwise_backward.py`` in place of the first three. Five
launches for all items of a call, three without weight gradients.

Reference: ``Reference.fan_in``. Test: tests/triton_interpret.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .. import plan
from ..calls import Call, Item
from ..interface import Arrays
from . import common
from .common import block_channels, pixel_stride
from .dropout import dropout_factor
from .gradient_rows import device_table, node_gradients, pick_gradient
from .output_gradient import AVG, MAX, PRODUCT, RECTIFY, output_gradient
from .pointwise_backward import pointwise_backward
from .record import search_specialisations
from .registry import Specialisation, register
from .transposed import tiles, transposed
from .weight_gradient import product, weight_gradients

_ELEMENTS = 1024
_PROGRAMS = 512


@triton.jit(
    do_not_specialize=["pixels", "H", "W", "H_OUT", "W_OUT", "groups", "pools", "reduces", "skips"]
)
def _fan_in_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr, x_ptr, parts_ptr, dz_ptr, incoming_ptr, coef_ptr, rate_ptr,
    state_ptr, table_ptr, out_ptr,
    g0_pixel, g1_pixel, g2_pixel, g3_pixel, x_pixel, parts_slot, dz_slot, incoming_pixel,
    pixels, H, W, H_OUT, W_OUT, groups, pools, reduces, skips,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr, INCOMING: tl.constexpr,
):  # fmt: skip
    """Program: a tile of x. The table holds ``reduces`` rows and then ``skips``.

    parts: ``groups`` of convolutions, then ``pools`` (0 or 1).
    """
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    m_p = pixel < pixels
    m = m_p[:, None] & m_c[None, :]
    at = pixel[:, None] * C + c[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    parts = parts_ptr + at
    for _ in range(groups):
        total += tl.load(parts, mask=m, other=0.0).to(tl.float32)
        parts += parts_slot
    if STRIDE == 2:
        w = (pixel % W).to(tl.int32)
        h = ((pixel // W) % H).to(tl.int32)
        source = (pixel // (W * H) * H_OUT + h // 2) * W_OUT + w // 2
        together = m_p & (h % 2 == w % 2)
        m_r = together[:, None] & m_c[None, :]
        half = (source + (w % 2) * (dz_slot // C))[:, None] * C + c[None, :]
        for row in range(reduces):
            dz = dz_ptr + tl.load(table_ptr + row * 16 + 1).to(tl.int64) * dz_slot
            total += tl.load(dz + half, mask=m_r, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + pixel[:, None] * x_pixel + c[None, :], mask=m, other=0.0).to(tl.float32)
    total = tl.where(x > 0, total, 0.0)
    for _ in range(pools):
        total += tl.load(parts, mask=m, other=0.0).to(tl.float32)
    if INCOMING:
        place = pixel[:, None] * incoming_pixel + c[None, :]
        total += tl.load(incoming_ptr + place, mask=m, other=0.0).to(tl.float32)
    if STRIDE == 1:
        for row in range(reduces, reduces + skips):
            entry = table_ptr + row * 16
            g_ptr, g_pixel = pick_gradient(
                tl.load(entry + 1), -1, g0_ptr, g1_ptr, g2_ptr, g3_ptr, x_ptr,
                g0_pixel, g1_pixel, g2_pixel, g3_pixel, x_pixel, C,
            )  # fmt: skip
            factor = tl.load(coef_ptr + tl.load(entry) * (3 * C) + c, mask=m_c, other=0.0)
            g = tl.load(g_ptr + pixel[:, None] * g_pixel + c[None, :], mask=m, other=0.0)
            g = g.to(tl.float32) * factor[None, :]
            stream = tl.load(entry + 2)
            if stream >= 0:
                g *= dropout_factor(rate_ptr, state_ptr, stream, pixel, BLOCK_C, CHANNELS)
            total += g
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=m)


@dataclass(frozen=True)
class _Rows:
    """Tables of a call as lists; of ``gradients`` the first ``launched`` rows are programs."""

    gradients: list[list[int]]
    launched: int
    arrays: int
    stencils: list[list[int]]
    groups: list[list[int]]
    pools: int
    ends: list[list[int]]
    reduces: int


def _split(
    stencils: list[tuple[Item, int]], count: int, offsets: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Convolutions in about ``count`` groups of one dilation and like cost: rows, groups."""
    rows: list[list[int]] = []
    groups: list[list[int]] = []
    for dilation in (1, 2):
        ours = [(item, out) for item, out in stencils if item.dilation == dilation]
        ours.sort(key=lambda pair: -pair[0].kernel)
        number = min(len(ours), max(1, round(count * len(ours) / max(1, len(stencils)))))
        for which in range(number):
            begin = len(rows)
            rows += [
                [common.kind(item), out, offsets[item.depthwise]]
                for item, out in ours[which::number]
            ]
            groups.append([begin, len(rows), len(groups), dilation])
    return rows, groups


def _make_rows(
    call: Call, offsets: list[int], splits: int, channels: int, half: int, rectify: bool,
    training: bool,
) -> _Rows:  # fmt: skip
    gradients, ends = [], []
    stencils: list[tuple[Item, int]] = []
    pools: dict[int, list[int]] = {plan.MAX_POOL: [], plan.AVG_POOL: []}
    arrays = 0
    skips = []
    for i, item in enumerate(call.items):
        row = [PRODUCT, i, item.slot, item.node, item.half]
        if item.kind == plan.SKIP:
            skips.append([i, item.node, item.stream if training else -1])
        elif item.kind in pools:
            pools[item.kind].append(i)
        elif item.kind == plan.FACTORIZED:
            ends.append([i, arrays])
            for low, high in ((0, half), (half, channels)):
                gradients.append([*row, offsets[item.pointwise], arrays, low, high])
                arrays += 1
        else:
            gradients.append([*row, offsets[item.pointwise], arrays, 0, channels])
            stencils.append((item, arrays))
            arrays += 1
    rows, groups = _split(stencils, splits, offsets)
    begin = len(rows)
    shared: list[list[int]] = []
    launched = len(gradients) + sum(map(bool, pools.values())) + rectify
    for kind, numbers in pools.items():
        if numbers:
            first = call.items[numbers[0]]
            extra = [launched + len(shared), len(numbers), arrays + 1]
            op = MAX if kind == plan.MAX_POOL else AVG
            gradients.append([op, numbers[0], first.slot, 0, -1, 0, arrays, 0, 0, 0, *extra])
            rows.append([common.kind(first), arrays, 0, arrays + 1])
            arrays += 2 if op == MAX else 1
            shared += [[0, number, 0, call.items[number].node] for number in numbers]
    if len(rows) > begin:
        groups.append([begin, len(rows), len(groups), 1])
    if rectify:
        gradients.append([RECTIFY, 0, 0, 0, -1, 0, 0])
    return _Rows(
        gradients + shared, launched, arrays, rows, groups, int(len(rows) > begin), ends + skips,
        len(ends),
    )  # fmt: skip


_made: dict[tuple[object, ...], _Rows] = {}


def _rows(
    call: Call, arrays: Arrays, splits: int, wanted: bool
) -> tuple[_Rows, tuple[object, ...]]:
    """The rows of a call and the key that they were made under."""
    channels = arrays.y.shape[-1]
    key = (splits, channels, wanted, arrays.training)
    found = _made.get((call, *key))
    if found is None:
        offsets, half = arrays.weights.layout.offsets, arrays.channels // 2
        found = _make_rows(call, offsets, splits, channels, half, wanted, arrays.training)
        _made[(call, *key)] = found
    return found, key


def fan_in(
    call: Call,
    arrays: Arrays,
    x: Tensor,
    coef: Tensor,
    incoming: Tensor | None,
    out: Tensor | None,
) -> None:
    """``interface.Backend.fan_in``."""
    common.check_storage(arrays.y)
    first = call.items[0]
    wanted = arrays.weights.grad is not None
    size = (arrays.y.shape[2], arrays.y.shape[3])
    if first.depthwise < 0 and first.kind in (plan.POINTWISE, plan.FACTORIZED) and (
        len(call.items) == 1 and len(arrays.grads) == 1
    ):  # fmt: skip
        if out is not None:
            pointwise_backward(call, arrays, x, coef, incoming, out)
        if wanted:
            products = [product(first, 0, 0, arrays.weights.layout.offsets)]
            weight_gradients(call, arrays, products, x[None], size, coef, rectified=False)
        return
    _gather(call, arrays, x, coef, incoming, out, size)


def _gather(
    call: Call,
    arrays: Arrays,
    x: Tensor,
    coef: Tensor,
    incoming: Tensor | None,
    out: Tensor | None,
    size: tuple[int, int],
) -> None:
    """Of everything on the edges that leave a state."""
    y, wanted = arrays.y, arrays.weights.grad is not None
    stride = 1 if size == tuple(x.shape[1:3]) else 2
    splits = triton.cdiv(_PROGRAMS, tiles(x.shape, stride))
    rows, key = _rows(call, arrays, splits, wanted)
    dz = y.new_empty(max(1, rows.arrays), *y.shape[1:])
    parts = y.new_empty(max(1, len(rows.groups)), *x.shape)
    rectified = y.new_empty(1, *x.shape) if wanted else dz
    if rows.launched:
        table = device_table(call, ("output_gradient", *key), y.device, lambda: rows.gradients)
        output_gradient(arrays, table, rows.launched, dz, rectified, x, size, coef)
    if out is not None and rows.groups:
        groups = device_table(call, ("groups", *key), y.device, lambda: rows.groups)
        table = device_table(call, ("transposed", *key), y.device, lambda: rows.stencils)
        transposed(arrays, groups, len(rows.groups), table, dz, parts)
    if out is not None:
        _finish(call, arrays, rows, key, x, coef, parts, dz, incoming, out)
    offsets = arrays.weights.layout.offsets
    products = [
        product(item, i, 0, offsets) for i, item in enumerate(call.items) if item.pointwise >= 0
    ]
    if wanted and products:
        weight_gradients(call, arrays, products, rectified, size, coef, rectified=True)


def _finish(
    call: Call,
    arrays: Arrays,
    rows: _Rows,
    key: tuple[object, ...],
    x: Tensor,
    coef: Tensor,
    parts: Tensor,
    dz: Tensor,
    incoming: Tensor | None,
    out: Tensor,
) -> None:
    grads, strides = node_gradients(arrays)
    channels, pixels = x.shape[-1], x[..., 0].numel()
    block_c = block_channels(channels)
    block_p = _ELEMENTS // block_c * common.TILE_SCALE
    extra = x if incoming is None else incoming
    table = device_table(call, ("ends", *key), x.device, lambda: rows.ends or [[0]])
    _fan_in_kernel[(triton.cdiv(pixels, block_p),)](
        *grads, x, parts, dz, extra, coef, arrays.rate, arrays.state, table, out,
        *strides, pixel_stride(x), parts.stride(0), dz.stride(0), pixel_stride(extra),
        pixels, x.shape[1], x.shape[2], dz.shape[2], dz.shape[3],
        len(rows.groups) - rows.pools, rows.pools, rows.reduces, len(rows.ends) - rows.reduces,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, CHANNELS=arrays.channels,
        STRIDE=1 if x.shape[1:3] == dz.shape[2:4] else 2, INCOMING=incoming is not None,
    )  # fmt: skip


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_fan_in_kernel)


register(
    "fan_in",
    _fan_in_kernel,
    reference="Reference.fan_in",
    maths="dx = incoming + [x > 0] sum D + pools + skips",
    why="8 elements a thread of 4 warps: bound by memory",
    specialisations=_specialisations,
)
