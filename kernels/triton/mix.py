"""A node: the weighted sum of everything that enters it.

    out = shift + sum of scale y over branches + sum of scale dropout(x) over skips

One pass: every y and x is read once, out is written once, and relu of it, which convolutions read,
for a node that edges leave. Branches are a loop over a table; skips
are told apart by the state they read, since states are arrays of their own.

Reference: ``Reference.mix``.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import Call
from ..interface import Arrays
from . import common
from .common import block_channels, gated_storages, pixel_stride
from .dropout import dropout_factor
from .registry import Specialisation, register

_ELEMENTS, _WARPS = 1024, 4


@triton.jit
def _skip(
    total, x_ptr, x_pixel, scale_ptr, row, rate_ptr, state_ptr, p, m, m_c, c,
    C: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds the skip from one state; ``row`` holds its item, or -1 for none, and its stream."""
    item = tl.load(row)
    if item >= 0:
        scale = tl.load(scale_ptr + item * C + c[None, :], mask=m_c[None, :], other=0.0)
        x = tl.load(x_ptr + p[:, None] * x_pixel + c[None, :], mask=m, other=0.0).to(tl.float32)
        stream = tl.load(row + 1)
        if stream >= 0:
            x *= dropout_factor(rate_ptr, state_ptr, stream, p, BLOCK_C, CHANNELS)
        total += x * scale
    return total


@triton.jit(do_not_specialize=["pixels", "branches"])
def _mix_kernel(
    y_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, s4_ptr, out_ptr, kept_ptr, scale_ptr, shift_ptr,
    table_ptr, skips_ptr, rate_ptr, state_ptr,
    y_slot, s0_pixel, s1_pixel, s2_pixel, s3_pixel, s4_pixel, out_pixel, pixels, branches,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS: tl.constexpr,
    SKIPS: tl.constexpr, SHIFTS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_P pixels. SKIPS: whether there may be skips. SHIFTS: one for each item. KEEP:
    relu of the node goes to ``kept``.
    """
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    m = (p < pixels)[:, None] & m_c[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    if not SHIFTS:
        total += tl.load(shift_ptr + c[None, :], mask=m_c[None, :], other=0.0)
    place = y_ptr + p[:, None] * C + c[None, :]
    for i in range(branches):
        slot = tl.load(table_ptr + i * 16 + 2).to(tl.int64)
        item = tl.load(table_ptr + i * 16 + 9)
        y = tl.load(place + slot * y_slot, mask=m, other=0.0).to(tl.float32)
        total += y * tl.load(scale_ptr + item * C + c[None, :], mask=m_c[None, :], other=0.0)
        if SHIFTS:
            total += tl.load(shift_ptr + item * C + c[None, :], mask=m_c[None, :], other=0.0)
    if SKIPS:
        total = _skip(
            total, s0_ptr, s0_pixel, scale_ptr, skips_ptr, rate_ptr, state_ptr, p, m, m_c, c,
            C, BLOCK_C, CHANNELS,
        )  # fmt: skip
        total = _skip(
            total, s1_ptr, s1_pixel, scale_ptr, skips_ptr + 2, rate_ptr, state_ptr, p, m, m_c, c,
            C, BLOCK_C, CHANNELS,
        )  # fmt: skip
        total = _skip(
            total, s2_ptr, s2_pixel, scale_ptr, skips_ptr + 4, rate_ptr, state_ptr, p, m, m_c, c,
            C, BLOCK_C, CHANNELS,
        )  # fmt: skip
        total = _skip(
            total, s3_ptr, s3_pixel, scale_ptr, skips_ptr + 6, rate_ptr, state_ptr, p, m, m_c, c,
            C, BLOCK_C, CHANNELS,
        )  # fmt: skip
        total = _skip(
            total, s4_ptr, s4_pixel, scale_ptr, skips_ptr + 8, rate_ptr, state_ptr, p, m, m_c, c,
            C, BLOCK_C, CHANNELS,
        )  # fmt: skip
    out = out_ptr + p[:, None] * out_pixel + c[None, :]
    stored = total.to(out_ptr.dtype.element_ty)
    tl.store(out, stored, mask=m)
    if KEEP:
        kept = tl.maximum(stored, 0.0).to(kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + p[:, None] * C + c[None, :], kept, mask=m)


_skip_tables: WeakKeyDictionary[Call, dict[tuple[object, ...], Tensor]] = WeakKeyDictionary()
_NOT_SKIPS = tuple(kind for kind in range(9) if kind != common.SKIP)
MAX_SOURCES = 5


def skip_table(call: Call, arrays: Arrays) -> Tensor | None:
    """By source: item number of its skip, -1 for none, and dropout stream, -1 for none.

    Returns:
        int32 ``[MAX_SOURCES, 2]`` on the device, made once; None if the call has no skips.

    Raises:
        ValueError: A skip leaves a later state than the kernels have pointers for.
    """
    skips = [(i, item) for i, item in enumerate(call.items) if common.kind(item) == common.SKIP]
    if not skips:
        return None
    key = (arrays.y.device, arrays.training)
    made = _skip_tables.setdefault(call, {})
    if key not in made:
        rows = [[-1, -1] for _ in range(MAX_SOURCES)]
        for i, item in skips:
            if item.source >= MAX_SOURCES:
                raise ValueError(
                    f"Triton kernels take skips from {MAX_SOURCES} states, not from {item.source}"
                )
            rows[item.source] = [i, item.stream if arrays.training else -1]
        made[key] = torch.tensor(rows, dtype=torch.int32).to(arrays.y.device)
    return made[key]


def mix(
    call: Call,
    arrays: Arrays,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
) -> None:
    """``interface.Backend.mix``; ``kept`` gets relu of the node, ``[N, H, W, C]``."""
    channels = out.shape[-1]
    pixels = out.numel() // channels
    block = block_channels(channels)
    rows = max(1, _ELEMENTS // block) * common.TILE_SCALE
    table = common.table(call, arrays, _NOT_SKIPS)
    skips = skip_table(call, arrays)
    states, strides = common.states(arrays)
    _mix_kernel[(triton.cdiv(pixels, rows),)](
        arrays.y,
        *states[:MAX_SOURCES],
        out,
        out if kept is None else kept,
        scale,
        shift,
        shift if table is None else table,
        shift if skips is None else skips,
        arrays.rate,
        arrays.state,
        arrays.y.stride(0),
        *strides[:MAX_SOURCES],
        pixel_stride(out),
        pixels,
        0 if table is None else len(table),
        C=channels,
        BLOCK_C=block,
        BLOCK_P=rows,
        CHANNELS=arrays.channels,
        SKIPS=skips is not None,
        SHIFTS=shift.dim() == 2,
        KEEP=kept is not None,
        num_warps=_WARPS,
    )


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for storage in gated_storages(channels):
            for skips, shifts, keep in (
                (False, False, False), (True, False, False), (True, True, False),
                (True, True, True),
            ):  # fmt: skip
                pixels, branches = 96 * size * size, 25
                width = 4 if storage == "fp32" else 2
                arrays = 1 + branches + (5 if skips else 0) + keep
                found.append(
                    Specialisation(
                        shape=(96, size, size, channels),
                        storage=storage,
                        signature=_signature(storage, skips),
                        constants={
                            "C": channels,
                            "BLOCK_C": channels,
                            "BLOCK_P": _ELEMENTS // channels,
                            "CHANNELS": channels,
                            "SKIPS": skips,
                            "SHIFTS": shifts,
                            "KEEP": keep,
                        },
                        divisible=("y_slot", *(f"s{i}_pixel" for i in range(5)), "out_pixel"),
                        num_warps=_WARPS,
                        programs=pixels * channels // _ELEMENTS,
                        bytes=pixels * channels * width * arrays,
                        stencil_flops=2 * pixels * channels * (arrays - 1),
                        trips=branches,
                        note="with skips" * skips + " and shifts" * shifts + ", kept" * keep,
                    )
                )
    return found


def _signature(storage: str, skips: bool) -> dict[str, str]:
    pointers = ("y_ptr", *(f"s{i}_ptr" for i in range(5)), "out_ptr", "kept_ptr")
    data = dict.fromkeys(pointers, f"*{storage}")
    return data | {
        "scale_ptr": "*fp32",
        "shift_ptr": "*fp32",
        "table_ptr": "*i32",
        "skips_ptr": "*i32" if skips else "*fp32",
        "rate_ptr": "*fp32",
        "state_ptr": "*i64",
        "y_slot": "i32",
        **{f"s{i}_pixel": "i32" for i in range(5)},
        "out_pixel": "i32",
        "pixels": "i32",
        "branches": "i32",
    }


register(
    "mix",
    _mix_kernel,
    reference="Reference.mix",
    maths="out = shift + sum(scale y) + sum(scale dropout(x))",
    why="bound by memory: one 16-byte access a thread and branch, loop of independent loads",
    specialisations=_specialisations,
)
