"""1x1 convolutions of rectified inputs: preprocessing and factorized reduces, with moments.

    POINTWISE:   y[p] = W relu(x[p])
    FACTORIZED:  the first SPLIT channels see even rows and columns, the others odd ones

Reference: ``Reference.fan_out``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .registry import Specialisation, register
from .weights import packed


@triton.jit
def _one_by_one_product(
    value, x, matrix_ptr, inside, c, m_c,
    C_IN: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """value + relu(x) W^T for the output channels m_c. x: pointers to pixels, [P]."""
    for start in range(0, C_IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(x[:, None] + k[None, :], mask=inside[:, None], other=0.0)
        rows = tl.maximum(rows.to(tl.float32), 0.0).to(x.dtype.element_ty)
        # [C in, C out]: the matrix is stored [C out, C in].
        matrix = tl.load(matrix_ptr + c[None, :] * C_IN + k[:, None], mask=m_c[None, :], other=0.0)
        value = tl.dot(rows.to(OPERAND), matrix.to(OPERAND), value, input_precision=PRECISION)
    return value


@triton.jit(do_not_specialize=["N", "H", "W", "H_OUT", "W_OUT", "tiles", "split"])
def _one_by_one_kernel(
    x_ptr, x1_ptr, y_ptr, matrices_ptr, partials_ptr, table_ptr, x_pixel, y_slot, N, H, W,
    H_OUT, W_OUT, tiles, split,
    C: tl.constexpr, BLOCK_C: tl.constexpr, C_IN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, FACTORIZED: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (item, tile): BLOCK_M pixels of one item.

    Factorized reduces may leave two states: x1 is state 1, x any other.
    """
    tile = tl.program_id(1)
    row = table_ptr + tl.program_id(0) * 16
    matrix = matrices_ptr + tl.multiple_of(tl.load(row + 4), 16)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixels = N * H_OUT * W_OUT
    inside = p < pixels
    value = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    if FACTORIZED:
        x_ptr = tl.where(tl.load(row + 5) == 1, x1_ptr, x_ptr)
        w = (p % W_OUT) * 2
        h = (p // W_OUT % H_OUT) * 2
        n = p // (W_OUT * H_OUT)
        x = x_ptr + ((n.to(tl.int64) * H + h) * W + w) * x_pixel
        value = _one_by_one_product(
            value, x, matrix, inside, c, m_c & (c < split), C_IN, BLOCK_K, PRECISION, OPERAND
        )
        odd = inside & (h + 1 < H) & (w + 1 < W)
        value = _one_by_one_product(
            value, x + (W + 1) * x_pixel, matrix, odd, c, m_c & (c >= split),
            C_IN, BLOCK_K, PRECISION, OPERAND,
        )  # fmt: skip
    else:
        x = x_ptr + p.to(tl.int64) * x_pixel
        value = _one_by_one_product(
            value, x, matrix, inside, c, m_c, C_IN, BLOCK_K, PRECISION, OPERAND
        )
    m = inside[:, None] & m_c[None, :]
    stored = value.to(y_ptr.dtype.element_ty)
    y = y_ptr + tl.load(row + 2).to(tl.int64) * y_slot + p.to(tl.int64)[:, None] * C + c[None, :]
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


def settings(storage: str, channels: int, in_channels: int) -> dict[str, Any]:
    """Tile and warps: 16 outputs a thread; with 32, or 4 warps from 128 channels on, some spilled.

    A thread still loads 8 channels of half precision, 16 bytes.
    """
    block = common.block_channels(channels)
    wide = storage in ("fp32", "tf32")
    deep = in_channels >= 128 and not wide
    depth = max(size for size in (16, 32) if in_channels % size == 0)
    return {
        "BLOCK_C": block,
        "BLOCK_M": max(16, (4096 if deep else 2048) // block) * common.TILE_SCALE,
        "BLOCK_K": 16 if wide else depth,
        "num_warps": 8 if deep else 4,
        "maxnreg": 128,
    }


def one_by_one(
    call: Call, arrays: Arrays, x: Tensor, partials: Tensor, other: Tensor | None = None
) -> None:
    """Those items of ``fan_out`` that are 1x1 convolutions.

    Args:
        x: What they read.
        other: What those read that leave state 1, if the call has items of two states.
        partials: float32 ``[n, tiles, 3, C]``; rows of these items are written, tiles that they
            do not have with zeros.
    """
    y = arrays.y
    for wanted in (common.POINTWISE, common.FACTORIZED):
        table = common.table(call, arrays, (wanted,))
        if table is None:
            continue
        item = next(item for item in call.items if common.kind(item) == wanted)
        chosen = settings(common.STORAGE[y.dtype], y.shape[-1], x.shape[-1])
        factorized = wanted == common.FACTORIZED
        _one_by_one_kernel[(len(table), partials.shape[1])](
            x,
            x if other is None else other,
            y,
            packed(arrays.weights, y.dtype).matrices,
            partials,
            table,
            common.pixel_stride(x),
            y.stride(0),
            *x.shape[:3],
            *y.shape[2:4],
            partials.shape[1],
            arrays.weights.layout.padded[item.pointwise][0] if factorized else 0,
            C=y.shape[-1],
            C_IN=x.shape[-1],
            FACTORIZED=factorized,
            PRECISION=common.precision(y.dtype),
            OPERAND=common.operand_dtype(y.dtype),
            **chosen,
        )


def count_tiles(shape: tuple[int, ...], storage: str) -> int:
    """Tiles of an output ``[N, H, W, C]``."""
    block = settings(storage, shape[-1], 16)["BLOCK_M"]
    return triton.cdiv(shape[0] * shape[1] * shape[2], block)


# Output channels, size, input channels, whether factorized, items: the first cells of stage 1
# (3 C stem channels), a normal and a reduction cell, and the one after it.
_CASES = (
    (16, 32, 48, False, 1),
    (16, 32, 64, False, 1),
    (32, 32, 64, False, 1),
    (32, 16, 64, True, 1),
    (32, 16, 128, False, 1),
    (32, 16, 32, True, 4),
    (64, 16, 128, False, 1),
    (64, 8, 128, True, 1),
    (64, 8, 256, False, 1),
    (64, 8, 64, True, 4),
)


def _specialisations() -> list[Specialisation]:
    return [
        _specialisation(storage, *case)
        for case in _CASES
        for storage in common.gated_storages(case[0], product=True)
    ]


def _specialisation(
    storage: str, channels: int, size: int, in_channels: int, factorized: bool, items: int
) -> Specialisation:
    chosen = settings(storage, channels, in_channels)
    warps = chosen.pop("num_warps")
    registers = chosen.pop("maxnreg")
    data = "fp32" if storage == "tf32" else storage
    pixels, width = 96 * size * size, 4 if data == "fp32" else 2
    sizes = ("N", "H", "W", "H_OUT", "W_OUT", "tiles", "split")
    return Specialisation(
        shape=(96, size, size, channels),
        storage=storage,
        signature={
            **dict.fromkeys(("x_ptr", "x1_ptr", "y_ptr", "matrices_ptr"), f"*{data}"),
            "partials_ptr": "*fp32",
            "table_ptr": "*i32",
            **dict.fromkeys(("x_pixel", "y_slot", *sizes), "i32"),
        },
        constants={
            "C": channels,
            "C_IN": in_channels,
            "FACTORIZED": factorized,
            "PRECISION": {"fp32": "tf32x3", "tf32": "tf32"}.get(storage, "ieee"),
            "OPERAND": {"bf16": tl.bfloat16, "fp16": tl.float16}.get(storage, tl.float32),
            **chosen,
        },
        divisible=("x_pixel", "y_slot"),
        num_warps=warps,
        max_registers=registers,
        programs=items * triton.cdiv(pixels, chosen["BLOCK_M"]),
        bytes=pixels * width * (items * channels + in_channels * (2 if factorized else 1)),
        product_flops=2 * items * pixels * channels * in_channels * (2 if factorized else 1),
        trips=in_channels / chosen["BLOCK_K"],
        note=f"from {in_channels}, factorized" if factorized else f"from {in_channels}",
        product=True,
    )


register(
    "one_by_one",
    _one_by_one_kernel,
    reference="Reference.fan_out",
    maths="y = W relu(x), of shifted halves if factorized; moments",
    why="see preprocess.settings",
    specialisations=_specialisations,
)
