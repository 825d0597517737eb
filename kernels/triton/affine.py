"""Normalised arrays: ``out = in * scale + shift`` by channel, rectified or not.

``affine_`` works in place on a preprocessed input; ``both_affine_`` may keep relu of it, which
convolutions read. ``rectified`` writes what second halves of separable convolutions read: a stencil
that normalised on the fly would do so once a tap.

Reference: ``Reference.affine_``, and the first line of ``Reference.mid``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import TILE_SCALE, block_channels, gated_storages, pixel_stride
from .registry import Specialisation, register

# 8 elements of 2 bytes are 16 bytes: 1024 a program are one access for each thread of 4 warps, and
# as 2048 they are two in flight.
_ELEMENTS, _WARPS = 2048, 4
# Left alone, the assembler takes 40 in float32 and spills.
_REGISTERS = 64


@triton.jit(do_not_specialize=["pixels"])
def _affine_kernel(
    in_ptr, out_ptr, other_ptr, scale_ptr, shift_ptr, table_ptr, in_pixel, out_pixel, in_slot,
    out_slot, pixels,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, RELU: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Program (tile, item). RELU: item i reads and writes the slots of table row i; else the second
    item is ``other``, in place, and KEEP: relu of item i goes to row i of ``out``.
    """
    item = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    if RELU:
        x_ptr = in_ptr + tl.load(table_ptr + item * 16 + 1).to(tl.int64) * in_slot
        out_ptr += tl.load(table_ptr + item * 16 + 10).to(tl.int64) * out_slot
    else:
        x_ptr = tl.where(item == 0, in_ptr, other_ptr)
        out_ptr += item.to(tl.int64) * out_slot
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = (p < pixels)[:, None] & m_c[None, :]
    x = tl.load(x_ptr + p.to(tl.int64)[:, None] * in_pixel + c[None, :], mask=m)
    scale = tl.load(scale_ptr + item * C + c[None, :], mask=m_c[None, :])  # [1, BLOCK_C]
    shift = tl.load(shift_ptr + item * C + c[None, :], mask=m_c[None, :])
    value = x.to(tl.float32) * scale + shift
    if RELU:
        value = tl.maximum(value, 0.0)
    value = value.to(out_ptr.dtype.element_ty)
    if not RELU:
        tl.store(x_ptr + p.to(tl.int64)[:, None] * in_pixel + c[None, :], value, mask=m)
        value = tl.maximum(value, 0.0).to(out_ptr.dtype.element_ty)
    if RELU or KEEP:
        out = out_ptr + p.to(tl.int64)[:, None] * out_pixel + c[None, :]
        tl.store(out, value, mask=m)


def _launch(
    x: Tensor,
    out: Tensor,
    other: Tensor,
    scale: Tensor,
    shift: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    slots: tuple[int, int],
    relu: bool = False,
    keep: bool = False,
) -> None:
    """``grid``: pixels and items."""
    pixels, items = grid
    channels = x.shape[-1]
    block = block_channels(channels)
    rows = max(1, _ELEMENTS // block) * TILE_SCALE
    _affine_kernel[(triton.cdiv(pixels, rows), items)](
        x,
        out,
        other,
        scale,
        shift,
        table,
        pixel_stride(x[0] if relu else x),
        pixel_stride(out[0] if relu or keep else out),
        *slots,
        pixels,
        C=channels,
        BLOCK_C=block,
        BLOCK_P=rows,
        RELU=relu,
        KEEP=keep,
        num_warps=_WARPS,
        maxnreg=_REGISTERS,
    )


def affine_(y: Tensor, scale: Tensor, shift: Tensor) -> None:
    """``y = y * scale + shift`` in place; y ``[N, H, W, C]``, the others float32 ``[C]``."""
    _launch(y, y, y, scale, shift, scale, (y[..., 0].numel(), 1), (0, 0))


def both_affine_(
    first: Tensor, second: Tensor, scale: Tensor, shift: Tensor, kept: Tensor | None
) -> None:
    """``affine_`` of two arrays of the same layout by rows of scale and shift, ``[2, C]``.

    Args:
        kept: Gets relu of both, ``[2, N, H, W, C]``; or None.
    """
    grid = (first[..., 0].numel(), 2)
    keep, out = kept is not None, first if kept is None else kept
    slots = (0, out.stride(0) if keep else 0)
    _launch(first, out, second, scale, shift, scale, grid, slots, keep=keep)


def rectified(y: Tensor, table: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """``relu(y[input] * scale + shift)`` of every item.

    Args:
        y: ``[slots, N, H, W, C]``.
        table: int32 ``[n, TABLE_WIDTH]``.
        scale, shift: float32 ``[n, C]``.
        out: ``[.., N, H, W, C]`` of the dtype of y, written at the table's ``out``.
    """
    grid = (y[0, ..., 0].numel(), len(table))
    slots = (y.stride(0), out.stride(0))
    _launch(y, out, out, scale, shift, table, grid, slots, relu=True)


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for storage in gated_storages(channels):
            for relu, keep in ((False, False), (False, True), (True, False)):
                pixels, items = 96 * size * size, 8 if relu else 1
                width = 4 if storage == "fp32" else 2
                found.append(
                    Specialisation(
                        shape=(96, size, size, channels),
                        storage=storage,
                        signature={
                            "in_ptr": f"*{storage}",
                            "out_ptr": f"*{storage}",
                            "other_ptr": f"*{storage}",
                            "scale_ptr": "*fp32",
                            "shift_ptr": "*fp32",
                            "table_ptr": "*i32" if relu else "*fp32",
                            "in_pixel": "i32",
                            "out_pixel": "i32",
                            "in_slot": "i32",
                            "out_slot": "i32",
                            "pixels": "i32",
                        },
                        constants={
                            "C": channels,
                            "BLOCK_C": channels,
                            "BLOCK_P": _ELEMENTS // channels,
                            "RELU": relu,
                            "KEEP": keep,
                        },
                        divisible=("in_pixel", "out_pixel", "in_slot", "out_slot"),
                        num_warps=_WARPS,
                        max_registers=_REGISTERS,
                        programs=triton.cdiv(pixels * channels, _ELEMENTS) * items,
                        bytes=(2 + keep) * pixels * channels * width * items,
                        note="rectified" if relu else "in place" + ", kept" * keep,
                    )
                )
    return found


register(
    "affine",
    _affine_kernel,
    reference="Reference.affine_, Reference.mid",
    maths="out = [relu](in scale + shift)",
    why="bound by memory: two 16-byte accesses a thread in flight",
    specialisations=_specialisations,
)
