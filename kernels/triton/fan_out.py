"""Stencils with moments: all depthwise-separable convolutions and pools of a call in one launch.

    y = W (d * relu(x))      or      y = max or mean of a 3x3 window of x
    partial of every tile: count, mean and centred second moment of every channel of y

Convolutions of stride 1 read rectified arrays: those of states are written where the states are,
so no stencil rectifies what it loads ten times. Items of one tile run side by side, so that their
common input comes from the second-level cache.

Reference: ``Reference.fan_out`` and ``Reference.mid``.
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
from .stencil import _convolve, _pool, _product_and_moments
from .weights import packed


@triton.jit(do_not_specialize=["N", "H", "W", "H_OUT", "W_OUT", "tiles", "half"])
def _fan_out_kernel(
    x_ptr, x1_ptr, stack_ptr, y_ptr, taps_ptr, matrices_ptr, partials_ptr, table_ptr,
    x_pixel, stack_slot, y_slot, N, H, W, H_OUT, W_OUT, tiles, half,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (item, tile). SECOND: of second halves. x1 is state 1, x any other.

    Convolutions of stride 1 read a row of the stack, rectified; all else reads a state.
    """
    item = tl.program_id(0)
    tile = tl.program_id(1)
    row = table_ptr + item * 16
    kind = tl.load(row)
    taps = taps_ptr + tl.multiple_of(tl.load(row + 3), 16)
    RELU: tl.constexpr = STRIDE == 2
    state = tl.where(tl.load(row + 5) == 1, x1_ptr, x_ptr)
    if RELU:
        x, pixel = state, x_pixel
    else:
        x, pixel = stack_ptr + tl.load(row + 1).to(tl.int64) * stack_slot, C
    if kind == 0:
        _convolve(
            x, y_ptr, taps, row, pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
            C, BLOCK_C, BLOCK_P, 3, 1, STRIDE, RELU, ROWS,
        )  # fmt: skip
    elif kind == 1:
        _convolve(
            x, y_ptr, taps, row, pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
            C, BLOCK_C, BLOCK_P, 5, 1, STRIDE, RELU, ROWS,
        )  # fmt: skip
    if not SECOND:
        if kind == 2:
            _convolve(
                x, y_ptr, taps, row, pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, 3, 2, STRIDE, RELU, ROWS,
            )  # fmt: skip
        elif kind == 3:
            _convolve(
                x, y_ptr, taps, row, pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, 5, 2, STRIDE, RELU, ROWS,
            )  # fmt: skip
        elif kind == 4:
            _pool(
                state, y_ptr, row, x_pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, STRIDE, True, ROWS,
            )  # fmt: skip
        elif kind == 5:
            _pool(
                state, y_ptr, row, x_pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
                C, BLOCK_C, BLOCK_P, STRIDE, False, ROWS,
            )  # fmt: skip
    y = y_ptr + tl.load(row + 2).to(tl.int64) * y_slot
    matrix = matrices_ptr + tl.multiple_of(tl.load(row + 4), 16)
    number = tl.load(row + 9).to(tl.int64)
    partial = partials_ptr + (number * tiles + tile) * (3 * C)
    spacing = 1
    if STRIDE == 1 and not SECOND and (kind == 2 or kind == 3):
        spacing = 2
    tl.debug_barrier()  # rows are read below by other threads than wrote them
    _product_and_moments(
        y, matrix, partial, tile, spacing, (kind < 4) | (kind == 6), N, H_OUT, W_OUT,
        state, x_pixel, H, W, half, kind == 6,
        C, BLOCK_C, BLOCK_P, BLOCK_M, BLOCK_K, RELU, PRECISION, OPERAND, ROWS,
    )  # fmt: skip


def settings(storage: str, channels: int, blackwell: bool) -> dict[str, Any]:
    """Tile and warps by storage; ``tf32`` is float32 with plain TF32 products.

    A thread of 4 warps holds 8 channels of one column, 16 bytes of bfloat16. float32 takes 8
    warps: 4 channels a thread, or the sums of 4 rows and the loads in flight exceed 128 registers.
    Products are 4 rows at once in half precision; in float32 half of them, 16 input channels at a
    time, since an operand takes twice the room, and three products four times; a quarter from
    C=64 on, where half spilled 8 bytes on sm_80.

    For Blackwell the compiler pairs float32 arithmetic, and pairs of registers fit 128 only with 2
    rows a group in half precision: 4 rows took 138 to 148, or spilled up to 32 bytes. So does
    float16 everywhere: 4 rows spilled up to 24 bytes on sm_90.
    """
    block = common.block_channels(channels)
    wide = storage in ("fp32", "tf32")
    columns = max(16, 1024 // block) * common.TILE_SCALE
    rows = 2 if storage == "fp16" or (blackwell and not wide) else 4
    chunk = rows if not wide else 2 if block < 64 else 1
    return {
        "ROWS": rows,
        "BLOCK_C": block,
        "BLOCK_P": columns,
        "BLOCK_M": max(16, chunk * columns),
        "BLOCK_K": 16 if wide else min(64, block),
        "num_warps": 8 if wide else 4,
        "num_stages": 1,
        "maxnreg": 128,
    }


def is_blackwell(device: torch.device) -> bool:
    """Whether a device has tensor memory: sm_100 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def count_tiles(shape: torch.Size | tuple[int, ...], block_p: int, rows: int) -> int:
    """Tiles of an output ``[N, H, W, C]``, of the item that has most."""
    images, height, width, _ = shape
    groups = max(triton.cdiv(height, rows * spacing) * spacing for spacing in (1, 2))
    return triton.cdiv(images * groups * width, block_p)


def _launch(
    table: Tensor,
    arrays: Arrays,
    states: tuple[Tensor, Tensor],
    stack: Tensor,
    partials: Tensor,
    stride: int,
    second: bool,
) -> None:
    x, y = states[0], arrays.y
    storage = y.dtype
    weights = packed(arrays.weights, storage)
    channels = y.shape[-1]
    _fan_out_kernel[(len(table), partials.shape[1])](
        *states,
        stack,
        y,
        weights.pairs,
        weights.matrices,
        partials,
        table,
        common.pixel_stride(x),
        stack.stride(0),
        y.stride(0),
        *x.shape[:3],
        *y.shape[2:4],
        partials.shape[1],
        arrays.channels // 2,
        C=channels,
        STRIDE=stride,
        SECOND=second,
        PRECISION=common.precision(storage),
        OPERAND=common.operand_dtype(storage),
        **settings(common.STORAGE[storage], channels, is_blackwell(y.device)),
    )


def empty_partials(call: Call, y: Tensor) -> Tensor:
    """Room for the moments of tiles of a call's arrays, which are like those in y."""
    storage = common.STORAGE[y.dtype]
    if _is_preprocessing(call):
        tiles = preprocess.count_tiles(y.shape[1:], storage)
    else:
        chosen = settings(storage, y.shape[-1], is_blackwell(y.device))
        tiles = count_tiles(y.shape[1:], chosen["BLOCK_P"], chosen["ROWS"])
    return y.new_empty((len(call.items), tiles, 3, y.shape[-1]), dtype=torch.float32)


def _is_preprocessing(call: Call) -> bool:
    """Whether ``preprocess`` has the kernel: input channels may be others than those of y."""
    kinds = {common.kind(item) for item in call.items}
    return kinds <= {common.POINTWISE, common.FACTORIZED}


def leaving(
    call: Call,
    arrays: Arrays,
    x: Tensor,
    partials: Tensor,
    other: Tensor,
    places: tuple[int, ...],
    stack: Tensor,
) -> None:
    """Everything that leaves a state, or states 0 and 1, and the moments of tiles.

    Args:
        x: The state.
        partials: float32 ``[n, tiles, 3, C]`` of ``empty_partials``, written.
        other: State 1, if the call has items of two, else x.
        places: With stride 1, where in ``stack`` relu of the state of every item is.
        stack: ``[.., N, H, W, C]``.
    """
    if _is_preprocessing(call):
        preprocess.one_by_one(call, arrays, (x, other), partials)
        return
    table = common.table(call, arrays, changed={"input": places})
    assert table is not None
    _launch(table, arrays, (x, other), stack, partials, call.items[0].stride, False)


def second_halves(
    call: Call,
    arrays: Arrays,
    scale: Tensor,
    shift: Tensor,
    partials: Tensor,
    places: tuple[int, ...],
    stack: Tensor,
) -> None:
    """Second halves and the moments of tiles.

    Args:
        scale, shift: float32 ``[n, C]``.
        partials, stack: As for ``leaving``.
        places: Where in ``stack`` the normalised and rectified input of every item goes.
    """
    table = common.table(call, arrays, changed={"out": places})
    assert table is not None
    rectified(arrays.y, table, scale, shift, stack)
    table = common.table(call, arrays, changed={"input": places})
    assert table is not None
    _launch(table, arrays, (stack[0], stack[0]), stack, partials, 1, second=True)


def fan_out(call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
    """``interface.Backend.fan_out``."""
    common.check_storage(arrays.y)
    items, y = call.items, arrays.y
    partials = empty_partials(call, y)
    reads = any(item.depthwise >= 0 and item.stride == 1 for item in items)
    stack = x.relu().contiguous()[None] if reads else y
    leaving(call, arrays, x, partials, x, (0,) * len(items), stack)
    fold(partials, sums)


def mid(call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
    """``interface.Backend.mid``."""
    items, y = len(call.items), arrays.y
    partials = empty_partials(call, y)
    stack = y.new_empty((items, *y.shape[1:]))
    second_halves(call, arrays, scale, shift, partials, tuple(range(items)), stack)
    fold(partials, sums)


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for storage in common.gated_storages(channels, product=True):
            for stride, second in ((1, False), (2, False), (1, True)):
                if (channels, stride) == (16, 2):
                    continue
                for blackwell in (False, True):
                    found.append(
                        _specialisation(channels, size, storage, stride, second, blackwell)
                    )
    return found


def _specialisation(
    channels: int, size: int, storage: str, stride: int, second: bool, blackwell: bool
) -> Specialisation:
    chosen = settings(storage, channels, blackwell)
    warps = chosen.pop("num_warps")
    registers, stages = chosen.pop("maxnreg"), chosen.pop("num_stages")
    data = "fp32" if storage == "tf32" else storage
    shape = (96, size, size, channels)
    tiles = count_tiles(shape, chosen["BLOCK_P"], chosen["ROWS"])
    taps = [9, 25] if second else [9, 25, 9, 25]
    edges = 4
    reduces = edges if stride == 2 else 0
    items = edges * len(taps) + (0 if second else 2) + reduces
    pixels, width = 96 * size * size, 4 if data == "fp32" else 2
    read = (edges * len(taps) if second else 1) * stride * stride
    pointers = ("x_ptr", "x1_ptr", "stack_ptr", "y_ptr", "matrices_ptr")
    strides = ("x_pixel", "stack_slot", "y_slot")
    sizes = ("N", "H", "W", "H_OUT", "W_OUT", "tiles", "half")
    return Specialisation(
        shape=shape,
        storage=storage,
        signature={
            **dict.fromkeys(pointers, f"*{data}"),
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
        num_stages=stages,
        max_registers=registers,
        programs=items * tiles,
        bytes=pixels * channels * width * (items + read),
        stencil_flops=2 * pixels * channels * (edges * sum(taps) + (0 if second else 18)),
        product_flops=2 * pixels * channels * channels * (edges * len(taps) + 2 * reduces),
        trips=sum(t**0.5 for t in taps) / len(taps),
        note="second halves" if second else f"stride {stride}",
        product=True,
        targets=("sm_100",) if blackwell else ("sm_80", "sm_90", "gfx942"),
    )


register(
    "fan_out",
    _fan_out_kernel,
    reference="Reference.fan_out, Reference.mid",
    maths="y = W (d * relu(x)); pools; moments",
    why="see fan_out.settings",
    specialisations=_specialisations,
)
