"""Sums of partial sums in a fixed order: what follows every kernel that reduces over the batch.

    out[i, c] = sum over programs p of partials[i, p, c]          float64 of float32

Reference: ``reference._pixel_sums``. Test: tests/triton_interpret.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import TILE_SCALE, block_channels
from .record import search_specialisations
from .registry import Specialisation, register

ELEMENTS = 1024


@triton.jit
def sum_row(base, programs, c, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over programs of float32 [programs, C], float64 [BLOCK_C]."""
    b = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float64)
    for first in range(0, programs, BLOCK):
        p = first + b
        m = (p < programs)[:, None] & (c < C)[None, :]
        acc += tl.load(base + p[:, None] * C + c[None, :], mask=m, other=0.0).to(tl.float64)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partials_ptr, out_ptr, programs, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program i makes row i of out. A float64 sum a column, since rows have opposite signs."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    total = sum_row(partials_ptr + i * programs * C, programs, c, C, BLOCK_C, BLOCK)
    tl.store(out_ptr + i * C + c, total, mask=c < C)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    """Sums over programs.

    Args:
        partials: float32 ``[n, programs, C]``, contiguous.
        out: float64, contiguous, ``n * C`` elements, written.
    """
    rows, programs, channels = partials.shape
    block = block_channels(channels)
    _sum_partials_kernel[(rows,)](
        partials, out, programs, C=channels, BLOCK_C=block, BLOCK=ELEMENTS // block * TILE_SCALE
    )


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_sum_partials_kernel)


register(
    "sum_partials",
    _sum_partials_kernel,
    reference="reference._pixel_sums",
    maths="out[i, c] = sum_p partials[i, p, c]",
    why="1024 elements are two loads of 16 bytes a thread of 4 warps",
    specialisations=_specialisations,
)
