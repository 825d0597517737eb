"""Running statistics of a cell's BatchNorms: one launch for all of them.

    running += momentum (batch - running),    batches += 1

with the variance of the batch times M / (M - 1). Buffers are tensors of their own: a table on the
device holds their addresses, so a launch of ``torch._foreach_lerp_`` for every 64 is saved. Loads
are 4 bytes wide since nothing is known of those addresses.

Reference: ``cell_operator.move_running``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments import MOMENTUM
from ..plan import Plan
from .common import block_channels
from .registry import Specialisation, register

_MOMENTUM: tl.constexpr = tl.constexpr(MOMENTUM)
# More are a sign of buffers that move at every step, as in a program that copies what it writes.
MAX_TABLES = 4096
_tables: dict[tuple[object, ...], Tensor] = {}


@triton.jit(do_not_specialize=["slots", "slot_pixels", "input_pixels", "channels"])
def _running_kernel(
    stats_ptr, addresses_ptr, slots, slot_pixels, input_pixels, channels,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program: a norm. addresses, int64 [norms, 4]: mean, variance, counter, row of stats."""
    row = addresses_ptr + tl.program_id(0) * 4
    mean_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    variance_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    counter_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int64))
    slot = tl.load(row + 3)
    pixels = tl.where(slot < slots, slot_pixels, input_pixels).to(tl.float64)
    factor = pixels / tl.maximum(pixels - 1.0, 1.0)
    c = tl.arange(0, BLOCK_C)
    m = c < channels
    stats = stats_ptr + slot * (2 * C) + c
    mean = tl.load(stats, mask=m, other=0.0).to(tl.float32)
    variance = (tl.load(stats + C, mask=m, other=0.0) * factor).to(tl.float32)
    old = tl.load(mean_ptr + c, mask=m, other=0.0)
    tl.store(mean_ptr + c, old + _MOMENTUM * (mean - old), mask=m)
    old = tl.load(variance_ptr + c, mask=m, other=0.0)
    tl.store(variance_ptr + c, old + _MOMENTUM * (variance - old), mask=m)
    tl.store(counter_ptr, tl.load(counter_ptr) + 1)


def _addresses(plan: Plan, running: list[Tensor], batches: list[Tensor]) -> Tensor | None:
    """The table, made once for buffers at the same places; None if there are too many."""
    device = running[0].device
    addresses = tuple(x.data_ptr() for x in (*running, *batches))
    key = (plan.key, device, addresses)
    if key not in _tables:
        if len(_tables) >= MAX_TABLES:
            return None
        end = len(running)
        columns = (addresses[:end:2], addresses[1:end:2], addresses[end:], plan.norm_slots)
        rows = zip(*columns, strict=True)
        _tables[key] = torch.tensor([list(row) for row in rows], dtype=torch.int64).to(device)
    return _tables[key]


def move_running(
    plan: Plan, running: list[Tensor], batches: list[Tensor], stats: Tensor, counts: list[int]
) -> bool:
    """``cell_operator.move_running``; whether it was done, which takes float32 buffers.

    Args:
        running: Means and variances in turn, ``[C]``.
        batches: Counters, int64.
        stats: float64 ``[slots + 2, 2, C]``.
        counts: M of slots and of inputs.
    """
    plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in running)
    if not plain or any(x.dtype != torch.int64 for x in batches):
        return False
    table = _addresses(plan, running, batches)
    if table is None:
        return False
    channels = stats.shape[-1]
    _running_kernel[(len(batches),)](
        stats, table, plan.num_slots, counts[0], counts[1], plan.channels,
        C=channels, BLOCK_C=block_channels(channels), num_warps=1,
    )  # fmt: skip
    return True


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        sizes = ("slots", "slot_pixels", "input_pixels", "channels")
        found.append(
            Specialisation(
                shape=(96, size, size, channels),
                storage="fp32",
                signature={
                    "stats_ptr": "*fp64",
                    "addresses_ptr": "*i64",
                    **dict.fromkeys(sizes, "i32"),
                },
                constants={"C": channels, "BLOCK_C": channels},
                num_warps=1,
                programs=100,
                bytes=100 * (channels * 32 + 48),
                gathers=True,
            )
        )
    return found


register(
    "running",
    _running_kernel,
    reference="cell_operator.move_running",
    maths="running += momentum (batch - running)",
    why="a warp for C numbers",
    specialisations=_specialisations,
)
