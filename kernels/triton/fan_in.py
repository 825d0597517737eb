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
from .pointwise_backward import Side, pointwise_backward
from .record import search_specialisations
from .registry import Specialisation, register
from .transposed import tiles, transposed
from .weight_gradient import weight_gradients
from .weight_tasks import make_task, product

_ELEMENTS = 1024
_PROGRAMS = 512


@triton.jit(do_not_specialize=["pixels", "H", "W", "H_OUT", "W_OUT"])
def _fan_in_kernel(
    g0_ptr, g1_ptr, g2_ptr, g3_ptr, x_ptr, x1_ptr, parts_ptr, dz_ptr, incoming_ptr, coef_ptr,
    rate_ptr, state_ptr, table_ptr, out_ptr, partials_ptr,
    g0_pixel, g1_pixel, g2_pixel, g3_pixel, x_pixel, parts_slot, dz_slot, incoming_pixel, out_slot,
    pixels, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr, INCOMING: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Program (tile of x, state). SUMS: parts of sum(dx) and sum(dx x) are wanted.

    The table begins with a row a state: its first part, groups of convolutions, pools (0 or 1),
    then the first of its factorized reduces, of its skips, and the row after them.
    """
    which = tl.program_id(1)
    head = table_ptr + which * 16
    groups, pools = tl.load(head + 1), tl.load(head + 2)
    reduces, skips, end = tl.load(head + 3), tl.load(head + 4), tl.load(head + 5)
    x_ptr = tl.where(which == 1, x1_ptr, x_ptr)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    m_p = pixel < pixels
    m = m_p[:, None] & m_c[None, :]
    at = pixel[:, None] * C + c[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    parts = parts_ptr + tl.load(head).to(tl.int64) * parts_slot + at
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
        for row in range(reduces, skips):
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
        for row in range(skips, end):
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
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + which.to(tl.int64) * out_slot + at, stored, mask=m)
    if SUMS:
        dx = tl.where(m, stored.to(tl.float32), 0.0)
        programs = tl.num_programs(0)
        partial = partials_ptr + (which * 2 * programs + tl.program_id(0)) * C + c
        tl.store(partial, tl.sum(dx, 0), mask=m_c)
        tl.store(partial + programs * C, tl.sum(dx * x, 0), mask=m_c)


@dataclass(frozen=True)
class _Rows:
    """Tables of a call as lists; of ``gradients`` the first ``launched`` rows are programs."""

    gradients: list[list[int]]
    launched: int
    arrays: int
    stencils: list[list[int]]
    groups: list[list[int]]
    ends: list[list[int]]


class _Builder:
    """Collects the rows of one state after the other.

    Args:
        offsets, channels, half: Of the flat weights; C; channels of the first half of a reduce.
        splits: In how many groups the convolutions of a state are divided.
        training: Whether skips have dropout.
    """

    def __init__(
        self, offsets: list[int], channels: int, half: int, splits: int, training: bool
    ) -> None:
        self.offsets, self.channels, self.half = offsets, channels, half
        self.splits, self.training = splits, training
        self.gradients: list[list[int]] = []
        self.shared: list[list[int]] = []
        self.arrays = 0
        self.stencils: list[list[int]] = []
        self.groups: list[list[int]] = []
        self.heads: list[list[int]] = []
        self.ends: list[list[int]] = []

    def add(self, items: list[tuple[int, Item]], rectify: bool) -> None:
        """A state whose items come with their rows of coefficients."""
        which, first = len(self.heads), len(self.groups)
        stencils: list[tuple[Item, int]] = []
        pools: dict[int, list[tuple[int, Item]]] = {plan.MAX_POOL: [], plan.AVG_POOL: []}
        skips, begin = [], len(self.ends)
        for number, item in items:
            row = [PRODUCT, number, item.slot, item.node, item.half]
            if item.kind == plan.SKIP:
                skips.append([number, item.node, item.stream if self.training else -1])
            elif item.kind in pools:
                pools[item.kind].append((number, item))
            elif item.kind == plan.FACTORIZED:
                self.ends.append([number, self.arrays])
                for low, high in ((0, self.half), (self.half, self.channels)):
                    row_of_half = [*row, self.offsets[item.pointwise], self.arrays, low, high]
                    self.gradients.append(row_of_half)
                    self.arrays += 1
            else:
                row += [self.offsets[item.pointwise], self.arrays, 0, self.channels]
                self.gradients.append(row)
                stencils.append((item, self.arrays))
                self.arrays += 1
        self._split(stencils)
        head = [first, len(self.groups) - first]
        head += [self._pools(pools, which), begin, len(self.ends)]
        self.ends += skips
        self.heads.append([*head, len(self.ends)])
        if rectify:
            self.gradients.append([RECTIFY, 0, 0, 0, -1, 0, which, *[0] * 6, which])

    def _split(self, stencils: list[tuple[Item, int]]) -> None:
        """Convolutions in about ``splits`` groups of one dilation and like cost."""
        for dilation in (1, 2):
            ours = [(item, out) for item, out in stencils if item.dilation == dilation]
            ours.sort(key=lambda pair: -pair[0].kernel)
            share = round(self.splits * len(ours) / max(1, len(stencils)))
            number = min(len(ours), max(1, share))
            for part in range(number):
                begin = len(self.stencils)
                self.stencils += [
                    [common.kind(item), out, self.offsets[item.depthwise]]
                    for item, out in ours[part::number]
                ]
                self.groups.append([begin, len(self.stencils), len(self.groups), dilation])

    def _pools(self, pools: dict[int, list[tuple[int, Item]]], which: int) -> int:
        """How many groups the pools of state ``which`` are: one or none."""
        begin = len(self.stencils)
        for kind, edges in pools.items():
            if not edges:
                continue
            number, first = edges[0]
            op = MAX if kind == plan.MAX_POOL else AVG
            extra = [len(self.shared), len(edges), self.arrays + 1, which]
            self.gradients.append([op, number, first.slot, 0, -1, 0, self.arrays, 0, 0, 0, *extra])
            self.stencils.append([common.kind(first), self.arrays, 0, self.arrays + 1])
            self.arrays += 2 if op == MAX else 1
            self.shared += [[0, number, 0, item.node] for number, item in edges]
        if len(self.stencils) == begin:
            return 0
        self.groups.append([begin, len(self.stencils), len(self.groups), 1])
        return 1

    def rows(self) -> _Rows:
        """Everything, rows that others refer to behind those that are programs."""
        launched, heads = len(self.gradients), len(self.heads)
        for row in self.gradients:
            if row[0] in (MAX, AVG):
                row[10] += launched
        for head in self.heads:
            head[3:] = [at + heads for at in head[3:]]
        return _Rows(
            self.gradients + self.shared, launched, self.arrays, self.stencils, self.groups,
            self.heads + self.ends,
        )  # fmt: skip


_made: dict[tuple[object, ...], _Rows] = {}


def _rows(
    call: Call,
    arrays: Arrays,
    sources: tuple[int, ...],
    splits: int,
    wanted: bool,
    numbers: tuple[int, ...] | None,
) -> tuple[_Rows, tuple[object, ...]]:
    """The rows of a call and the key that they were made under."""
    channels = arrays.y.shape[-1]
    key = (sources, splits, channels, wanted, arrays.training, numbers)
    found = _made.get((call, *key))
    if found is None:
        offsets, half = arrays.weights.layout.offsets, arrays.channels // 2
        build = _Builder(offsets, channels, half, splits, arrays.training)
        pairs = list(zip(numbers or range(len(call.items)), call.items, strict=True))
        for source in sources:
            build.add([pair for pair in pairs if pair[1].source == source], wanted)
        found = _made[(call, *key)] = build.rows()
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
    first = call.items[0] if call.items else None
    wanted = arrays.weights.grad is not None
    if first is not None and first.kind in (plan.POINTWISE, plan.FACTORIZED) and (
        len(call.items) == 1 and len(arrays.grads) == 1
    ):  # fmt: skip
        if out is not None:
            pointwise_backward(call, [Side(call, arrays, x, out)], coef, incoming)
        if wanted:
            only = (product(first, 0, 0, arrays.weights.layout.offsets),)
            task = make_task(arrays, only, x[None], rectified=False)
            weight_gradients(call, arrays, task, x[None], coef)
        return
    states = {0 if first is None else first.source: x}
    to = None if out is None else out[None]
    rectified = x.new_empty(1, *x.shape) if wanted else None
    gather(call, arrays, states, coef, incoming, to, rectified)
    offsets = arrays.weights.layout.offsets
    products = tuple(
        product(item, i, 0, offsets) for i, item in enumerate(call.items) if item.pointwise >= 0
    )
    if rectified is not None and products:
        task = make_task(arrays, products, rectified, rectified=True)
        weight_gradients(call, arrays, task, rectified, coef)


def gather(
    call: Call,
    arrays: Arrays,
    states: dict[int, Tensor],
    coef: Tensor,
    incoming: Tensor | None,
    out: Tensor | None,
    rectified: Tensor | None,
    numbers: tuple[int, ...] | None = None,
    *,
    sums: bool = False,
) -> Tensor | None:
    """Gradient of a state, or two, from everything on the edges that leave it, but of no weight.

    Args:
        call: Items of all states.
        states: One or two of one shape by number, ``[N, H, W, C]``.
        coef: float32 ``[rows, 3, C]``.
        incoming: Gradient to add, ``[N, H, W, C]``, of a single state.
        out: Of every state, ``[states, N, H, W, C]``, written.
        rectified: Room for relu of every state, which weight gradients want, like out; or None.
        numbers: Row of coef of every item; None for its place in the call.
        sums: Whether sums are wanted.

    Returns:
        If so, parts of sum(dx) and sum(dx x) of every state, float32 ``[2 states, parts, C]``.
    """
    y, sources = arrays.y, tuple(states)
    x, other = states[sources[0]], states[sources[-1]]
    size = (y.shape[2], y.shape[3])
    stride = 1 if size == tuple(x.shape[1:3]) else 2
    splits = triton.cdiv(_PROGRAMS, tiles(x.shape, stride))
    rows, key = _rows(call, arrays, sources, splits, rectified is not None, numbers)
    dz = y.new_empty(max(1, rows.arrays), *y.shape[1:])
    parts = y.new_empty(max(1, len(rows.groups)), *x.shape)
    if rows.launched:
        table = device_table(call, ("output_gradient", *key), y.device, lambda: rows.gradients)
        room = dz if rectified is None else rectified
        output_gradient(arrays, table, rows.launched, dz, room, x, size, coef, other=other)
    if out is not None and rows.groups:
        groups = device_table(call, ("groups", *key), y.device, lambda: rows.groups)
        table = device_table(call, ("transposed", *key), y.device, lambda: rows.stencils)
        transposed(arrays, groups, len(rows.groups), table, dz, parts)
    if out is None:
        return None
    table = device_table(call, ("ends", *key), y.device, lambda: rows.ends)
    return _finish(arrays, table, (x, other), coef, parts, dz, incoming, out, sums)


def _finish(
    arrays: Arrays,
    table: Tensor,
    states: tuple[Tensor, Tensor],
    coef: Tensor,
    parts: Tensor,
    dz: Tensor,
    incoming: Tensor | None,
    out: Tensor,
    sums: bool,
) -> Tensor | None:
    x = states[0]
    grads, strides = node_gradients(arrays)
    channels, pixels = x.shape[-1], x[..., 0].numel()
    block_c = block_channels(channels)
    block_p = _ELEMENTS // block_c * common.TILE_SCALE
    programs = triton.cdiv(pixels, block_p)
    extra = x if incoming is None else incoming
    partials = None
    if sums:
        partials = coef.new_empty(2 * len(out), programs, channels)
    _fan_in_kernel[(programs, len(out))](
        *grads, *states, parts, dz, extra, coef, arrays.rate, arrays.state, table, out,
        coef if partials is None else partials,
        *strides, pixel_stride(x), parts.stride(0), dz.stride(0), pixel_stride(extra),
        out.stride(0), pixels, x.shape[1], x.shape[2], dz.shape[2], dz.shape[3],
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, CHANNELS=arrays.channels,
        STRIDE=1 if x.shape[1:3] == dz.shape[2:4] else 2, INCOMING=incoming is not None, SUMS=sums,
        # Left alone, the assembler aims at 32 registers for sm_90 and spills.
        maxnreg=64,
    )  # fmt: skip
    return partials


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
