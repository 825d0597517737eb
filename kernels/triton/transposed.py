"""Transposed stencils: the gradient of a depthwise convolution or pool to its input.

    dx[q] = sum over items and taps (i, j) of taps[i, j] dz[(q + PAD - (i, j) D) / STRIDE]

A program makes ``ROWS`` rows of ``BLOCK_P`` columns of one group of items and adds the items up. A
loaded row of dz feeds every row it takes part in; rows of dilated items are two apart, so that
they share dz too. With stride 2 a program holds
columns of one parity, so no tap of its loop is empty. Second halves (SECOND) are groups of one
item: masked by the ReLU, stored as the gradient of the half, with its batch sums.

Reference: ``reference.backward``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Arrays
from . import common
from .common import block_channels
from .record import search_specialisations
from .registry import Specialisation, register
from .stencil import full, load_tap, load_words, words
from .weights import packed

_ELEMENTS = 1024
ROWS: tl.constexpr = tl.constexpr(4)
TAPS, ONES, ARG = range(3)
_TAPS: tl.constexpr = tl.constexpr(TAPS)
_ARG: tl.constexpr = tl.constexpr(ARG)


@triton.jit
def _term(
    a, dz, tap, want, taps, i, C: tl.constexpr, BLOCK_C: tl.constexpr, K: tl.constexpr,
    HOW: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Adds what row i of the taps, if there is one, makes of dz."""
    if i >= 0 and i < K:
        if HOW == _TAPS:
            a += dz * load_tap(taps + i * K * C, C, BLOCK_C, PAIRS)
        elif HOW == _ARG:
            a += tl.where(tap == want, dz, 0.0)
        else:
            a += dz
    return a


@triton.jit
def _transpose(
    a0, a1, a2, a3, dz_ptr, arg_slot, taps_ptr, image, first, w, parity, inside, H_OUT, W_OUT,
    c, m_c, C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    HOW: tl.constexpr, PAUSE: tl.constexpr,
):  # fmt: skip
    """Adds one item to four rows of sums, D apart, fp32 like what ``load_words`` returns.

    Row ``base + UNIT s`` of dz reaches row k of the sums by tap ``k + LEAD - HALF s``. PAUSE:
    whether a barrier keeps the loads of eight rows apart, which makes or breaks 128 registers.
    """
    PAD: tl.constexpr = D * (K - 1) // 2
    HALF: tl.constexpr = 2 if STRIDE == 2 and D == 1 else 1
    UNIT: tl.constexpr = 2 if STRIDE == 1 and D == 2 else 1
    LEAD: tl.constexpr = PAD if HALF == 2 else 0
    # 8 channels a thread at stride 1 are the tightest fit into 128 registers.
    NARROW: tl.constexpr = STRIDE == 1 and dz_ptr.dtype.element_ty != tl.float32
    FIRST: tl.constexpr = -(PAD // 2) if HALF == 2 else 1 - K
    LAST: tl.constexpr = (3 + LEAD) // HALF
    base = first >> 1 if HALF == 2 else (first + PAD) >> (STRIDE - 1)
    end = K
    if STRIDE == 2 and D == 2:
        inside = inside & (first % 2 == 0)
        end = tl.where(parity == 0, K, 0)
    start = (image + (base + FIRST * UNIT) * W_OUT) * C
    # Sums of several items spilled 8 to 16 bytes in pairs.
    PAIRS: tl.constexpr = dz_ptr.dtype.element_ty == tl.bfloat16 and not PAUSE
    SHIFT: tl.constexpr = 1 if PAIRS else 0
    source = words(dz_ptr, PAIRS)
    args = words(dz_ptr + arg_slot, PAIRS)
    lanes = tl.arange(0, c.shape[0] >> SHIFT)[None, :]
    m_lanes = lanes < (C >> SHIFT)
    step = W_OUT * (UNIT * C >> SHIFT)
    for j in range((parity + PAD) % HALF, end, HALF):
        shifted = w + PAD - j * D
        col = shifted >> (STRIDE - 1)
        m_col = (inside & (shifted >= 0) & (col < W_OUT))[:, None]
        if c.shape[0] != C:
            m_col = m_col & m_lanes
        at = ((start + col * C) >> SHIFT)[:, None] + lanes
        taps = taps_ptr + j * C
        if HOW == _ARG and NARROW:
            # Rows without a tap match none of 0..8. A loop at run time: unrolled it spills.
            for s in range(FIRST, LAST + 1):
                row = base + s * UNIT
                m = m_col & ((row >= 0) & (row < H_OUT))[:, None]
                tap = load_words(args + at + (s - FIRST) * step, m, 9.0)
                dz = load_words(source + at + (s - FIRST) * step, m, 0.0)
                tap = tap - ((LEAD - HALF * s) * K + j) * 1.0
                a0 += tl.where(tap == 0.0, dz, 0.0)
                a1 += tl.where(tap == 1.0 * K, dz, 0.0)
                a2 += tl.where(tap == 2.0 * K, dz, 0.0)
                a3 += tl.where(tap == 3.0 * K, dz, 0.0)
        else:
            for s in tl.static_range(FIRST, LAST + 1):
                if PAUSE and NARROW and s - FIRST == 4:
                    tl.debug_barrier()
                row = base + s * UNIT
                m = m_col & ((row >= 0) & (row < H_OUT))[:, None]
                dz = load_words(source + at + (s - FIRST) * step, m, 0.0)
                tap = dz
                if HOW == _ARG:
                    tap = load_words(args + at + (s - FIRST) * step, m, 9.0)
                    tap = tap - ((LEAD - HALF * s) * K + j) * 1.0
                a0 = _term(
                    a0, dz, tap, 0.0, taps, LEAD - HALF * s,
                    C, c.shape[0], K, HOW, PAIRS,
                )  # fmt: skip
                a1 = _term(
                    a1, dz, tap, 1.0 * K, taps, LEAD + 1 - HALF * s,
                    C, c.shape[0], K, HOW, PAIRS,
                )  # fmt: skip
                a2 = _term(
                    a2, dz, tap, 2.0 * K, taps, LEAD + 2 - HALF * s,
                    C, c.shape[0], K, HOW, PAIRS,
                )  # fmt: skip
                a3 = _term(
                    a3, dz, tap, 3.0 * K, taps, LEAD + 3 - HALF * s,
                    C, c.shape[0], K, HOW, PAIRS,
                )  # fmt: skip
    return a0, a1, a2, a3


@triton.jit
def _store_half(
    a, out_ptr, y_ptr, scale, shift, pixel, m_row, c, m_c, total, product, C: tl.constexpr
):  # fmt: skip
    """One row of a half's gradient and its part of the sums."""
    m = m_row[:, None] & m_c[None, :]
    at = pixel[:, None] * C + c[None, :]
    v = tl.load(y_ptr + at, mask=m, other=0.0).to(tl.float32) * scale + shift
    a = tl.where((v > 0) & m, a, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, a, mask=m)
    a = a.to(tl.float32)
    return total + a, product + a * tl.maximum(v, 0.0)


@triton.jit
def _store_row(a, out_ptr, pixel, m_row, c, m_c, C: tl.constexpr):
    at = pixel[:, None] * C + c[None, :]
    tl.store(out_ptr + at, a.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["N", "H", "W", "H_OUT", "W_OUT"])
def _transposed_kernel(
    dz_ptr, taps_ptr, y_ptr, scale_ptr, shift_ptr, out_ptr, partials_ptr, groups_ptr, table_ptr,
    dz_slot, y_slot, out_slot, N, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    SECOND: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program (group, tile). H, W: of the gradient made; H_OUT, W_OUT: of dz.

    STEP: elements from a scale, or shift, to the next.
    """
    number = tl.program_id(0)
    tile = tl.program_id(1)
    group = groups_ptr + number * 16
    begin, end = tl.load(group), tl.load(group + 1)
    out = out_ptr + tl.load(group + 2).to(tl.int64) * out_slot
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    parity = tile % STRIDE
    p = (tile // STRIDE) * BLOCK_P + tl.arange(0, BLOCK_P)
    across = tl.cdiv(W, STRIDE)
    spacing = 1 if SECOND else tl.load(group + 3)  # of the rows of a program
    down = tl.cdiv(H, ROWS * spacing) * spacing
    w = (p % across) * STRIDE + parity
    first = (p // across) % down
    first = (first // spacing) * (ROWS * spacing) + first % spacing
    n = p // (across * down)
    inside = (n < N) & (w < W)
    image = n * (H_OUT * W_OUT)
    PAIRS: tl.constexpr = SECOND and dz_ptr.dtype.element_ty == tl.bfloat16
    a0 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    a1 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    a2 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    a3 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    for item in range(begin, end):
        row = table_ptr + item * 16
        kind = tl.load(row)
        dz = dz_ptr + tl.load(row + 1).to(tl.int64) * dz_slot
        taps = taps_ptr + tl.multiple_of(tl.load(row + 2), 16)
        if kind == 0:
            a0, a1, a2, a3 = _transpose(
                a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT, W_OUT,
                c, m_c, C, 3, 1, STRIDE, 0, not SECOND,
            )  # fmt: skip
        elif kind == 1:
            a0, a1, a2, a3 = _transpose(
                a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT, W_OUT,
                c, m_c, C, 5, 1, STRIDE, 0, not SECOND,
            )  # fmt: skip
        if not SECOND:
            if kind == 2:
                a0, a1, a2, a3 = _transpose(
                    a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT,
                    W_OUT, c, m_c, C, 3, 2, STRIDE, 0, not SECOND,
                )  # fmt: skip
            elif kind == 3:
                a0, a1, a2, a3 = _transpose(
                    a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT,
                    W_OUT, c, m_c, C, 5, 2, STRIDE, 0, not SECOND,
                )  # fmt: skip
            elif kind == 4:
                a0, a1, a2, a3 = _transpose(
                    a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT,
                    W_OUT, c, m_c, C, 3, 1, STRIDE, 2, not SECOND,
                )  # fmt: skip
            elif kind == 5:
                a0, a1, a2, a3 = _transpose(
                    a0, a1, a2, a3, dz, dz_slot, taps, image, first, w, parity, inside, H_OUT,
                    W_OUT, c, m_c, C, 3, 1, STRIDE, 1, not SECOND,
                )  # fmt: skip
    a0, a1 = tl.reshape(a0, [BLOCK_P, BLOCK_C]), tl.reshape(a1, [BLOCK_P, BLOCK_C])
    a2, a3 = tl.reshape(a2, [BLOCK_P, BLOCK_C]), tl.reshape(a3, [BLOCK_P, BLOCK_C])
    pixel = (n * H + first) * W + w
    m0 = inside & (first < H)
    m1 = inside & (first + spacing < H)
    m2 = inside & (first + 2 * spacing < H)
    m3 = inside & (first + 3 * spacing < H)
    if SECOND:
        y = y_ptr + tl.load(group + 3).to(tl.int64) * y_slot
        norm = tl.load(group + 4) * STEP + c
        scale = tl.load(scale_ptr + norm, mask=m_c, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + norm, mask=m_c, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        product = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        total, product = _store_half(
            a0, out, y, scale, shift, pixel, m0, c, m_c, total, product, C
        )  # fmt: skip
        total, product = _store_half(
            a1, out, y, scale, shift, pixel + W, m1, c, m_c, total, product, C
        )  # fmt: skip
        total, product = _store_half(
            a2, out, y, scale, shift, pixel + 2 * W, m2, c, m_c, total, product, C
        )  # fmt: skip
        total, product = _store_half(
            a3, out, y, scale, shift, pixel + 3 * W, m3, c, m_c, total, product, C
        )  # fmt: skip
        programs = tl.num_programs(1)
        partial = partials_ptr + (number.to(tl.int64) * 2 * programs + tile) * C + c
        tl.store(partial, tl.sum(total, 0), mask=m_c)
        tl.store(partial + programs * C, tl.sum(product, 0), mask=m_c)
    else:
        step = spacing * W
        _store_row(a0, out, pixel, m0, c, m_c, C)
        _store_row(a1, out, pixel + step, m1, c, m_c, C)
        _store_row(a2, out, pixel + 2 * step, m2, c, m_c, C)
        _store_row(a3, out, pixel + 3 * step, m3, c, m_c, C)


def _warps(element: int) -> int:
    """8 for float32: a thread holds 16 bytes of a row, and with 8 channels it would spill."""
    return 8 if element == 4 else 4


def _registers(storage: torch.dtype, stride: int, second: bool, ampere: bool) -> int | None:
    """Most registers of a thread, by what the assembler fits without a spill.

    With 128 throughout, float32 spilled 16 bytes on sm_80, its second halves 8 on sm_100, and
    float16 8 on sm_80, where it takes 112 if it may take any number; on sm_90 it would take 190.
    """
    if second:
        return 128 if storage == torch.bfloat16 else 124
    if storage == torch.float32:
        return 112
    return None if storage == torch.float16 and stride == 1 and ampere else 128


def _columns(channels: int) -> int:
    """Columns of a program."""
    return max(1, _ELEMENTS // block_channels(channels)) * common.TILE_SCALE


def tiles(shape: tuple[int, ...], stride: int) -> int:
    """Programs that make an array ``[N, H, W, C]``."""
    images, height, width, channels = shape
    rows = max(triton.cdiv(height, 4), 2 * triton.cdiv(height, 8))
    columns = images * rows * triton.cdiv(width, stride)
    return triton.cdiv(columns, _columns(channels)) * stride


def transposed(
    arrays: Arrays,
    groups: Tensor,
    count: int,
    table: Tensor,
    dz: Tensor,
    out: Tensor,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """One launch over all groups.

    Args:
        groups: int32 ``[n, 16]``: first row of ``table`` and the row after the last, where in
            ``out`` the group goes, the slot that second halves read or else the dilation of all
            items of the group, and the row in scale and shift of what second halves read.
        count: How many groups.
        table: int32 ``[n, 16]``: kind, where in ``dz`` its gradient is, offset of its taps. The
            taps of maxima follow their gradient in ``dz``.
        dz: ``[n, N, H_out, W_out, C]``.
        out: ``[n, N, H, W, C]``, written.
        second: Scale and shift, ``[rows, C]`` of one stride, of what second halves read.

    Returns:
        Of second halves partial sums of the gradient and of its product with the normalised
        input, float32 ``[2 n, tiles, C]``.
    """
    images, height, width, channels = out.shape[1:]
    stride = 1 if dz.shape[2:4] == out.shape[2:4] else 2
    programs, block_c = tiles(out.shape[1:], stride), block_channels(channels)
    partials = None
    if second is not None:
        shape = (2 * count, programs, channels)
        partials = torch.empty(shape, dtype=torch.float32, device=out.device)
    weights = packed(arrays.weights, out.dtype)
    ampere = out.is_cuda and torch.cuda.get_device_capability(out.device)[0] == 8
    _transposed_kernel[(count, programs)](
        dz, weights.taps if second is None else weights.pairs, arrays.y,
        *(second or (weights.taps, weights.taps)), out,
        weights.taps if partials is None else partials, groups, table,
        dz.stride(0), arrays.y.stride(0), out.stride(0), images, height, width, *dz.shape[2:4],
        C=channels, BLOCK_C=block_c, BLOCK_P=_columns(channels), STRIDE=stride,
        SECOND=second is not None,
        STEP=second[0].stride(0) if second and len(second[0]) > 1 else channels,
        num_warps=_warps(out.element_size()),
        maxnreg=_registers(out.dtype, stride, second is not None, ampere),
    )  # fmt: skip
    return partials


def _specialisations() -> list[Specialisation]:
    found = []
    for one in search_specialisations(_transposed_kernel):
        if one.storage == "fp16" and one.max_registers == 128 and one.constants["STRIDE"] == 1:
            found.append(replace(one, targets=("sm_90", "sm_100", "gfx942")))
            found.append(replace(one, targets=("sm_80",), max_registers=None))
        else:
            found.append(one)
    return found


register(
    "transposed",
    _transposed_kernel,
    reference="reference.backward",
    maths="dx[q] = sum_t taps[t] dz[q - t]",
    why="8 channels (fp32: 4) a thread, 4 rows: 32 sums and a column of loads fill 128 registers",
    specialisations=_specialisations,
)
