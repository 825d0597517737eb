"""Stencils with moments: all depthwise-separable convolutions and pools that leave a state.

    y = W (d * relu(x))      or      y = max or mean of a 3x3 window of x
    partial of every tile: count, mean and centred second moment of every channel of y

A program makes ``ROWS`` output rows of ``BLOCK_P`` columns (a column is an image, a group of rows
and a horizontal position) of one item. A loaded input row feeds every output row of the group that
it takes part in; rows of dilated convolutions are spaced so that they share input rows too. The
loop over horizontal taps stays a loop at run time: sums that a loop carries cannot be recomputed
for the layout of the product's operand, which is what spills an unrolled chain of taps.

Reference: ``Reference.fan_out`` and ``Reference.mid``. Test: tests/triton_interpret.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common, preprocess
from .affine import rectified
from .fold import fold
from .registry import Specialisation, register
from .weights import packed

ROWS: tl.constexpr = tl.constexpr(4)


@triton.jit
def _load_row(x, row, H, m, RELU: tl.constexpr, FILL: tl.constexpr):
    """One input row under every column, fp32 [BLOCK_P, BLOCK_C]; FILL outside of the image."""
    value = tl.load(x, mask=m & ((row >= 0) & (row < H))[:, None], other=FILL).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    return value


@triton.jit
def _columns(p, N, H_OUT, W_OUT, spacing):
    """Image, first output row and horizontal position of columns p.

    Rows of a group are ``spacing`` apart; groups that interleave follow one another.
    """
    w = p % W_OUT
    rest = p // W_OUT
    groups = tl.cdiv(H_OUT, ROWS * spacing) * spacing
    g = rest % groups
    first = (g // spacing) * (ROWS * spacing) + g % spacing
    return rest // groups, first, w


@triton.jit
def _write_rows(
    y_ptr, z0, z1, z2, z3, n, first, w, N, H_OUT, W_OUT, c, m_c,
    C: tl.constexpr, SPACING: tl.constexpr,
):  # fmt: skip
    """Stores the rows of a group, rounded to storage."""
    base = ((n.to(tl.int64) * H_OUT + first) * W_OUT + w) * C
    step = W_OUT * (SPACING * C)
    y = y_ptr + base[:, None] + c[None, :]
    m = (n < N)[:, None] & m_c[None, :]
    STORAGE: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y, z0.to(STORAGE), mask=m & (first < H_OUT)[:, None])
    tl.store(y + step, z1.to(STORAGE), mask=m & (first + SPACING < H_OUT)[:, None])
    tl.store(y + 2 * step, z2.to(STORAGE), mask=m & (first + 2 * SPACING < H_OUT)[:, None])
    tl.store(y + 3 * step, z3.to(STORAGE), mask=m & (first + 3 * SPACING < H_OUT)[:, None])


@triton.jit
def _product_and_moments(
    y_ptr, matrix_ptr, partial_ptr, tile, spacing, has_product, N, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y = W z in place, BLOCK_M pixels at a time, and the moments of y as it is stored."""
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    second = tl.zeros([BLOCK_C], dtype=tl.float32)
    for chunk in range(ROWS * BLOCK_P // BLOCK_M):
        q = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
        n, first, w = _columns(tile * BLOCK_P + q % BLOCK_P, N, H_OUT, W_OUT, spacing)
        row = first + (q // BLOCK_P) * spacing
        inside = (n < N) & (row < H_OUT)
        m = inside[:, None] & m_c[None, :]
        place = ((n.to(tl.int64) * H_OUT + row) * W_OUT + w) * C
        y = y_ptr + place[:, None] + c[None, :]
        if has_product:
            value = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
            for start in range(0, BLOCK_C, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                m_k = k < C
                z = tl.load(
                    y_ptr + place[:, None] + k[None, :],
                    mask=inside[:, None] & m_k[None, :],
                    other=0.0,
                )
                # [C in, C out]: the matrix is stored [C out, C in].
                matrix = tl.load(
                    matrix_ptr + c[None, :] * C + k[:, None],
                    mask=m_c[None, :] & m_k[:, None],
                    other=0.0,
                )
                value = tl.dot(z.to(OPERAND), matrix.to(OPERAND), value, input_precision=PRECISION)
            stored = value.to(y_ptr.dtype.element_ty)
            tl.debug_barrier()  # all have read what is overwritten now
            tl.store(y, stored, mask=m)
            value = stored.to(tl.float32)
        else:
            value = tl.load(y, mask=m, other=0.0).to(tl.float32)
        more = tl.sum(inside.to(tl.float32), 0)
        total = tl.maximum(count + more, 1.0)
        chunk_mean = tl.sum(value, 0) / tl.maximum(more, 1.0)
        deviation = tl.where(m, value - chunk_mean[None, :], 0.0)
        delta = chunk_mean - mean
        mean += delta * (more / total)
        second += tl.sum(deviation * deviation, 0) + delta * delta * (count * more / total)
        count += more
    tl.store(partial_ptr + c, mean * 0.0 + count, mask=m_c)
    tl.store(partial_ptr + C + c, mean, mask=m_c)
    tl.store(partial_ptr + 2 * C + c, second, mask=m_c)


@triton.jit
def _convolve(
    x_ptr, y_ptr, taps_ptr, x_pixel, tile, N, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    SPACING: tl.constexpr = 2 if D == 2 and STRIDE == 1 else 1
    UNIT: tl.constexpr = D if D == SPACING * STRIDE else 1  # rows from one input row to the next
    STEP: tl.constexpr = SPACING * STRIDE // UNIT  # input rows from one output row to the next
    PAD: tl.constexpr = D * (K - 1) // 2
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n, first, w = _columns(p, N, H_OUT, W_OUT, SPACING)
    top = first * STRIDE - PAD
    start = (n.to(tl.int64) * H + top) * W * x_pixel
    step = W * x_pixel * UNIT
    z0 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    z1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    z2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    z3 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for j in range(K):
        col = w * STRIDE + j * D - PAD
        m = ((col >= 0) & (col < W) & (n < N))[:, None] & m_c[None, :]
        column = x_ptr + (start + col * x_pixel)[:, None] + c[None, :]
        taps = taps_ptr + j * C + c[None, :]  # [1, BLOCK_C]
        for r in tl.static_range(3 * STEP + K):
            x = _load_row(column + r * step, top + r * UNIT, H, m, RELU, 0.0)
            if r < K:
                z0 += x * tl.load(taps + r * K * C, mask=m_c[None, :], other=0.0)
            if r >= STEP and r - STEP < K:
                z1 += x * tl.load(taps + (r - STEP) * K * C, mask=m_c[None, :], other=0.0)
            if r >= 2 * STEP and r - 2 * STEP < K:
                z2 += x * tl.load(taps + (r - 2 * STEP) * K * C, mask=m_c[None, :], other=0.0)
            if r >= 3 * STEP and r - 3 * STEP < K:
                z3 += x * tl.load(taps + (r - 3 * STEP) * K * C, mask=m_c[None, :], other=0.0)
    _write_rows(y_ptr, z0, z1, z2, z3, n, first, w, N, H_OUT, W_OUT, c, m_c, C, SPACING)


@triton.jit
def _pool(
    x_ptr, y_ptr, x_pixel, tile, N, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    FILL: tl.constexpr = float("-inf") if MAX else 0.0
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n, first, w = _columns(p, N, H_OUT, W_OUT, 1)
    top = first * STRIDE - 1
    start = (n.to(tl.int64) * H + top) * W * x_pixel
    step = W * x_pixel
    y0 = tl.full([BLOCK_P, BLOCK_C], FILL, dtype=tl.float32)
    y1 = tl.full([BLOCK_P, BLOCK_C], FILL, dtype=tl.float32)
    y2 = tl.full([BLOCK_P, BLOCK_C], FILL, dtype=tl.float32)
    y3 = tl.full([BLOCK_P, BLOCK_C], FILL, dtype=tl.float32)
    for j in range(3):
        col = w * STRIDE + j - 1
        m = ((col >= 0) & (col < W) & (n < N))[:, None] & m_c[None, :]
        column = x_ptr + (start + col * x_pixel)[:, None] + c[None, :]
        for r in tl.static_range(3 * STRIDE + 3):
            x = _load_row(column + r * step, top + r, H, m, False, FILL)
            if r < 3:
                y0 = tl.maximum(y0, x) if MAX else y0 + x
            if r >= STRIDE and r - STRIDE < 3:
                y1 = tl.maximum(y1, x) if MAX else y1 + x
            if r >= 2 * STRIDE and r - 2 * STRIDE < 3:
                y2 = tl.maximum(y2, x) if MAX else y2 + x
            if r >= 3 * STRIDE and r - 3 * STRIDE < 3:
                y3 = tl.maximum(y3, x) if MAX else y3 + x
    if not MAX:
        left = w * STRIDE
        across = tl.minimum(left + 2, W) - tl.maximum(left - 1, 0)
        y0 *= _share(first * STRIDE, across, H)[:, None]
        y1 *= _share((first + 1) * STRIDE, across, H)[:, None]
        y2 *= _share((first + 2) * STRIDE, across, H)[:, None]
        y3 *= _share((first + 3) * STRIDE, across, H)[:, None]
    _write_rows(y_ptr, y0, y1, y2, y3, n, first, w, N, H_OUT, W_OUT, c, m_c, C, 1)


@triton.jit
def _share(top, across, H):
    """1 / pixels of a window around row ``top`` that lie in the image."""
    down = tl.minimum(top + 2, H) - tl.maximum(top - 1, 0)
    return 1.0 / tl.maximum(across * down, 1).to(tl.float32)


@triton.jit(do_not_specialize=["N", "H", "W", "H_OUT", "W_OUT", "tiles"])
def _fan_out_kernel(
    x_ptr, y_ptr, taps_ptr, matrices_ptr, partials_ptr, table_ptr,
    x_slot, x_pixel, y_slot, N, H, W, H_OUT, W_OUT, tiles,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Program (item, tile). SECOND: x is a stack of inputs that are rectified already."""
    item = tl.program_id(0)
    tile = tl.program_id(1)
    row = table_ptr + item * 16
    kind = tl.load(row)
    source = tl.load(row + 1)
    slot = tl.load(row + 2)
    taps = taps_ptr + tl.multiple_of(tl.load(row + 3), 16)
    matrix = matrices_ptr + tl.multiple_of(tl.load(row + 4), 16)
    y = y_ptr + slot.to(tl.int64) * y_slot
    x = x_ptr
    if SECOND:
        x += source.to(tl.int64) * x_slot
    number = tl.load(row + 9).to(tl.int64)
    partial = partials_ptr + (number * tiles + tile) * (3 * C)
    RELU: tl.constexpr = not SECOND
    if kind == 0:
        _convolve(
            x, y, taps, x_pixel, tile, N, H, W, H_OUT, W_OUT,
            C, BLOCK_C, BLOCK_P, 3, 1, STRIDE, RELU,
        )  # fmt: skip
    elif kind == 1:
        _convolve(
            x, y, taps, x_pixel, tile, N, H, W, H_OUT, W_OUT,
            C, BLOCK_C, BLOCK_P, 5, 1, STRIDE, RELU,
        )  # fmt: skip
    if not SECOND:
        if kind == 2:
            _convolve(
                x, y, taps, x_pixel, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, 3, 2, STRIDE, RELU,
            )  # fmt: skip
        elif kind == 3:
            _convolve(
                x, y, taps, x_pixel, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, 5, 2, STRIDE, RELU,
            )  # fmt: skip
        elif kind == 4:
            _pool(
                x, y, x_pixel, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, STRIDE, True,
            )  # fmt: skip
        elif kind == 5:
            _pool(
                x, y, x_pixel, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, STRIDE, False,
            )  # fmt: skip
    spacing = 1
    if STRIDE == 1 and not SECOND and (kind == 2 or kind == 3):
        spacing = 2
    tl.debug_barrier()  # rows are read below by other threads than wrote them
    _product_and_moments(
        y, matrix, partial, tile, spacing, kind < 4, N, H_OUT, W_OUT,
        C, BLOCK_C, BLOCK_P, BLOCK_M, BLOCK_K, PRECISION, OPERAND,
    )  # fmt: skip


def settings(storage: str, channels: int) -> dict[str, Any]:
    """Tile and warps by storage; ``tf32`` is float32 with plain TF32 products.

    A thread of 4 warps holds 8 channels of one column, 16 bytes of bfloat16. float32 takes 8
    warps: 4 channels a thread, or the sums of 4 rows and the loads in flight exceed 128 registers.
    Products are 4 rows at once in half precision; in float32 half of them, 16 input channels at a
    time, since an operand takes twice the room, and three products four times.
    """
    block = common.block_channels(channels)
    wide = storage in ("fp32", "tf32")
    columns = max(16, 1024 // block) * common.TILE_SCALE
    return {
        "BLOCK_C": block,
        "BLOCK_P": columns,
        "BLOCK_M": max(16, (2 if wide else 4) * columns),
        "BLOCK_K": 16 if wide else min(64, block),
        "num_warps": 8 if wide else 4,
        "maxnreg": 128,
    }


def count_tiles(shape: torch.Size | tuple[int, ...], block_p: int) -> int:
    """Tiles of an output ``[N, H, W, C]``, of the item that has most."""
    images, height, width, _ = shape
    groups = max(triton.cdiv(height, 4 * spacing) * spacing for spacing in (1, 2))
    return triton.cdiv(images * groups * width, block_p)


def _launch(
    table: Tensor, arrays: Arrays, x: Tensor, partials: Tensor, stride: int, second: bool
) -> None:
    image = x[0] if second else x
    y = arrays.y
    storage = y.dtype
    weights = packed(arrays.weights, storage)
    channels = y.shape[-1]
    _fan_out_kernel[(len(table), partials.shape[1])](
        x,
        y,
        weights.taps,
        weights.matrices,
        partials,
        table,
        x.stride(0) if second else 0,
        common.pixel_stride(image),
        y.stride(0),
        *image.shape[:3],
        *y.shape[2:4],
        partials.shape[1],
        C=channels,
        STRIDE=stride,
        SECOND=second,
        PRECISION=common.precision(storage),
        OPERAND=common.operand_dtype(storage),
        **settings(common.STORAGE[storage], channels),
    )


def _partials(call: Call, y: Tensor) -> Tensor:
    storage = common.STORAGE[y.dtype]
    block_p = settings(storage, y.shape[-1])["BLOCK_P"]
    tiles = max(count_tiles(y.shape[1:], block_p), preprocess.count_tiles(y.shape[1:], storage))
    return y.new_empty((len(call.items), tiles, 3, y.shape[-1]), dtype=torch.float32)


def fan_out(call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
    """``interface.Backend.fan_out``."""
    common.check_storage(arrays.y)
    partials = _partials(call, arrays.y)
    stencils = common.table(call, arrays, common.STENCILS)
    if stencils is not None:
        _launch(stencils, arrays, x, partials, call.items[0].stride, second=False)
    preprocess.one_by_one(call, arrays, x, partials)
    fold(partials, sums)


def mid(call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
    """``interface.Backend.mid``."""
    table = common.table(call, arrays)
    assert table is not None
    partials = _partials(call, arrays.y)
    x = rectified(arrays.y, table, scale, shift)
    # Item i of the call reads row i of what was just written.
    _launch(common.numbered(call, arrays), arrays, x, partials, 1, second=True)
    fold(partials, sums)


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for storage in ("fp32", "tf32", "bf16", "fp16"):
            for stride, second in ((1, False), (2, False), (1, True)):
                if (channels, stride) != (16, 2):
                    found.append(_specialisation(channels, size, storage, stride, second))
    return found


def _specialisation(
    channels: int, size: int, storage: str, stride: int, second: bool
) -> Specialisation:
    chosen = settings(storage, channels)
    warps = chosen.pop("num_warps")
    registers = chosen.pop("maxnreg")
    data = "fp32" if storage == "tf32" else storage
    shape = (96, size, size, channels)
    tiles = count_tiles(shape, chosen["BLOCK_P"])
    taps = [9, 25] if second else [9, 25, 9, 25]
    edges = 4
    items = edges * len(taps) + (0 if second else 2)
    pixels, width = 96 * size * size, 4 if data == "fp32" else 2
    read = (edges * len(taps) if second else 1) * stride * stride
    pointers = ("x_ptr", "y_ptr", "matrices_ptr")
    strides = ("x_slot", "x_pixel", "y_slot")
    sizes = ("N", "H", "W", "H_OUT", "W_OUT", "tiles")
    return Specialisation(
        shape=shape,
        storage=storage,
        signature={
            **{name: f"*{data}" for name in pointers},
            "taps_ptr": "*fp32",
            "partials_ptr": "*fp32",
            "table_ptr": "*i32",
            **dict.fromkeys((*strides, *sizes), "i32"),
        },
        constants={
            "C": channels,
            "STRIDE": stride,
            "SECOND": second,
            "PRECISION": {"fp32": "tf32x3", "tf32": "tf32"}.get(storage, "ieee"),
            "OPERAND": {"bf16": tl.bfloat16, "fp16": tl.float16}.get(storage, tl.float32),
            **chosen,
        },
        divisible=strides,
        num_warps=warps,
        max_registers=registers,
        programs=items * tiles,
        bytes=pixels * channels * width * (items + read),
        stencil_flops=2 * pixels * channels * (edges * sum(taps) + (0 if second else 18)),
        product_flops=2 * pixels * channels * channels * edges * len(taps),
        trips=sum(t**0.5 for t in taps) / len(taps),
        note="second halves" if second else f"stride {stride}",
        product=True,
    )


register(
    "fan_out",
    _fan_out_kernel,
    reference="Reference.fan_out, Reference.mid",
    maths="y = W (d * relu(x)); pools; moments",
    why="see fan_out.settings",
    specialisations=_specialisations,
)
