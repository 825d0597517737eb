"""1x1 convolutions of rectified inputs: preprocessing and factorized reduces, with moments.

    POINTWISE:   y[p] = W relu(x[p])
    FACTORIZED:  the first half of the channels sees even rows and columns, the other odd ones

Weights are read as they are, not packed: a whole pass packs them in programs of the same launch.
Reference: ``Reference.fan_out``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .record import search_specialisations, with_tf32
from .registry import Specialisation, register
from .weights import BLOCK, _pack, index, packed


@triton.jit
def _one_by_one(
    x_ptr, x1_ptr, y_ptr, y1_ptr, flat_ptr, partials_ptr, table_ptr,
    x_pixel, x1_pixel, y_slot, C_IN, C_IN1, pixels, H, W, H_OUT, W_OUT, tiles, half,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of one item.

    Items read two arrays: x1 is input or state 1, x any other. H, W: of what a factorized reduce
    reads.
    """
    tile = tl.program_id(1)
    row = table_ptr + tl.program_id(0) * 16
    second = tl.load(row + 5) == 1
    x_ptr = tl.where(second, x1_ptr, x_ptr)
    x_pixel = tl.multiple_of(tl.where(second, x1_pixel, x_pixel), 16)
    width = tl.multiple_of(tl.where(second, C_IN1, C_IN), 16)
    factorized = tl.load(row) == 6
    matrix_ptr = flat_ptr + tl.multiple_of(tl.load(row + 4), 16)
    STORAGE: tl.constexpr = x_ptr.dtype.element_ty
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    k = tl.arange(0, BLOCK_K)
    p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = p < pixels
    pixel, m_odd, parts, split = p.to(tl.int64), inside, 1, C
    if factorized:
        w = (p % W_OUT) * 2
        h = (p // W_OUT % H_OUT) * 2
        pixel = ((p // (W_OUT * H_OUT)).to(tl.int64) * H + h) * W + w
        m_odd, parts, split = inside & (h + 1 < H) & (w + 1 < W), 2, half
    value = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    # Of a factorized reduce first the even pixels, then the odd ones.
    for part in range(parts):
        x = x_ptr + (pixel + part * (W + 1)) * x_pixel
        m_x = (inside & ((part == 0) | m_odd))[:, None]
        m_part = (m_c & ((c < split) == (part == 0)))[None, :]
        for start in range(0, width, BLOCK_K):
            rows = tl.load(x[:, None] + start + k[None, :], mask=m_x, other=0.0)
            rows = tl.maximum(rows.to(tl.float32), 0.0).to(STORAGE)
            # [C in, C out]: the matrix is stored [C out, C in].
            at = matrix_ptr + c[None, :] * width + start + k[:, None]
            matrix = tl.load(at, mask=m_part, other=0.0)
            value = tl.dot(
                rows.to(OPERAND), matrix.to(STORAGE).to(OPERAND), value,
                input_precision=PRECISION,
            )  # fmt: skip
    m = inside[:, None] & m_c[None, :]
    stored = value.to(y_ptr.dtype.element_ty)
    y = tl.where(second, y1_ptr, y_ptr) + tl.load(row + 2).to(tl.int64) * y_slot
    y += p.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y, stored, mask=m)
    value = stored.to(tl.float32)
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(value, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(m, value - mean[None, :], 0.0)
    second = tl.sum(deviation * deviation, 0)
    number = tl.load(row + 9).to(tl.int64)
    partial = partials_ptr + (number * tiles + tile) * (3 * C) + c
    tl.store(partial, mean * 0.0 + count, mask=m_c)
    tl.store(partial + C, mean, mask=m_c)
    tl.store(partial + 2 * C, second, mask=m_c)


@triton.jit(do_not_specialize=["pixels", "H", "W", "H_OUT", "W_OUT", "tiles", "half"])
def _one_by_one_kernel(
    x_ptr, x1_ptr, y_ptr, y1_ptr, flat_ptr, partials_ptr, table_ptr, index_ptr, taps_ptr,
    pairs_ptr, matrices_ptr, x_pixel, x1_pixel, y_slot, C_IN, C_IN1, pixels, H, W, H_OUT, W_OUT,
    tiles, half, total,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, PACK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (item, tile). PACK: those behind the last item pack PACK weights at a time."""
    is_item = True
    if PACK:
        is_item = tl.program_id(0) < tl.num_programs(0) - 1
    if is_item:
        _one_by_one(
            x_ptr, x1_ptr, y_ptr, y1_ptr, flat_ptr, partials_ptr, table_ptr,
            x_pixel, x1_pixel, y_slot, C_IN, C_IN1, pixels, H, W, H_OUT, W_OUT, tiles, half,
            C, BLOCK_C, BLOCK_M, BLOCK_K, PRECISION, OPERAND,
        )  # fmt: skip
    elif PACK:
        for first in range(tl.program_id(1) * PACK, total, tiles * PACK):
            _pack(
                flat_ptr, index_ptr, taps_ptr, pairs_ptr, matrices_ptr, total, first, PACK, PAIRS
            )  # fmt: skip


def settings(storage: str, channels: int, widths: Sequence[int]) -> dict[str, Any]:
    """Tile and warps: 16 outputs a thread in float32, 32 in half precision, or numbers of the
    table and moments are too many of what it moves.

    A thread loads 8 channels of half precision, 16 bytes.

    Args:
        widths: Input channels, of every input.
    """
    block = common.block_channels(channels)
    wide = storage in ("fp32", "tf32")
    depth = max(size for size in (16, 32) if math.gcd(*widths) % size == 0)
    return {
        "BLOCK_C": block,
        "BLOCK_M": max(16, (2048 if wide else 4096) // block) * common.TILE_SCALE,
        "BLOCK_K": 16 if wide else depth,
        "num_warps": 4,
        "num_stages": 1,
        "maxnreg": 128,
    }


def one_by_one(
    call: Call,
    arrays: Arrays,
    inputs: tuple[Tensor, Tensor],
    partials: Tensor,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    pack: bool = False,
) -> None:
    """``fan_out`` of items that all are 1x1 convolutions; they read the weights as they are.

    Args:
        inputs: What items read that leave any source but 1, and what those of source 1 read.
        partials: float32 ``[n, tiles, 3, C]``, written.
        outputs: Where items of either kind are written, if not to ``arrays.y``: a stack each.
        pack: Packs the weights of the cell too, into ``arrays.weights.extra``.
    """
    table = common.table(call, arrays)
    assert table is not None
    y, y1 = outputs or (arrays.y, arrays.y)
    widths = [x.shape[-1] for x in inputs]
    reduces = [item for item in call.items if common.kind(item) == common.FACTORIZED]
    read = inputs[reduces[0].source == 1] if reduces else inputs[0]
    weights = arrays.weights
    ready = packed(weights, y.dtype) if pack else None
    _one_by_one_kernel[(len(table) + pack, partials.shape[1])](
        *inputs,
        y,
        y1,
        weights.flat,
        partials,
        table,
        *((table, *[partials] * 3) if ready is None else (index(weights), *ready.arrays())),
        *map(common.pixel_stride, inputs),
        y.stride(0),
        *widths,
        y[0, ..., 0].numel(),
        *read.shape[1:3],
        *y.shape[2:4],
        partials.shape[1],
        arrays.channels // 2,
        weights.flat.numel(),
        C=y.shape[-1],
        PRECISION=common.precision(y.dtype),
        OPERAND=common.operand_dtype(y.dtype),
        PACK=BLOCK if pack else 0,
        PAIRS=pack and y.dtype == torch.bfloat16,
        **settings(common.STORAGE[y.dtype], y.shape[-1], widths),
    )


def count_tiles(shape: tuple[int, ...], storage: str) -> int:
    """Tiles of an output ``[N, H, W, C]``."""
    block = settings(storage, shape[-1], (16,))["BLOCK_M"]
    return triton.cdiv(shape[0] * shape[1] * shape[2], block)


def _specialisations() -> list[Specialisation]:
    return with_tf32(search_specialisations(_one_by_one_kernel, product=True))


register(
    "one_by_one",
    _one_by_one_kernel,
    reference="Reference.fan_out",
    maths="y = W relu(x), of shifted halves if factorized; moments",
    why="see preprocess.settings",
    specialisations=_specialisations,
)
