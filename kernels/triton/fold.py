"""Moments of tiles to moments of the batch: one launch for all items of a call.

With count m, mean a and centred second moment s of every tile:

    mean = sum(m a) / M,    variance = (sum(s) + sum(m (a - mean)^2)) / M,    M = sum(m)

in float64 and in the order of the tiles, so results are repeatable.

Reference: mean and biased variance in ``Reference._store``. Source: Chan, Golub, LeVeque 1979.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import block_channels
from .registry import Specialisation, register

_BLOCK_TILES = 32
_WARPS = 4


@triton.jit(do_not_specialize=["tiles"])
def _fold_kernel(
    partials_ptr, sums_ptr, tiles, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Program: an item. partials [n, tiles, 3, C] float32, sums [n, 2, C] float64."""
    item = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    t = tl.arange(0, BLOCK_T)[:, None]  # [BLOCK_T, 1]
    partial = partials_ptr + item.to(tl.int64) * tiles * (3 * C) + t * (3 * C) + c
    count = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    for start in range(0, tiles, BLOCK_T):
        m = (start + t < tiles) & (c < C)
        weight = tl.load(partial + start * (3 * C), mask=m, other=0.0).to(tl.float64)
        mean = tl.load(partial + start * (3 * C) + C, mask=m, other=0.0).to(tl.float64)
        count += weight
        total += weight * mean
    pixels = tl.maximum(tl.sum(count, 0, keep_dims=True), 1.0)
    batch_mean = tl.sum(total, 0, keep_dims=True) / pixels  # [1, BLOCK_C]
    second = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    for start in range(0, tiles, BLOCK_T):
        m = (start + t < tiles) & (c < C)
        weight = tl.load(partial + start * (3 * C), mask=m, other=0.0).to(tl.float64)
        mean = tl.load(partial + start * (3 * C) + C, mask=m, other=0.0).to(tl.float64)
        within = tl.load(partial + start * (3 * C) + 2 * C, mask=m, other=0.0).to(tl.float64)
        deviation = mean - batch_mean
        second += within + weight * deviation * deviation
    variance = tl.sum(second, 0, keep_dims=True) / pixels
    out = sums_ptr + item * (2 * C) + c
    tl.store(out, batch_mean, mask=c < C)
    tl.store(out + C, variance, mask=c < C)


def fold(partials: Tensor, sums: Tensor) -> None:
    """Writes mean and variance of every item.

    Args:
        partials: Count, mean and centred second moment of every tile, float32
            ``[n, tiles, 3, C]``; tiles of count 0 do not matter if they are finite.
        sums: float64 ``[n, 2, C]``, contiguous.
    """
    items, tiles, _, channels = partials.shape
    block = block_channels(channels)
    _fold_kernel[(items,)](
        partials,
        sums,
        tiles,
        C=channels,
        BLOCK_C=block,
        BLOCK_T=max(1, _BLOCK_TILES * 16 // block),
        num_warps=_WARPS,
    )


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        items, tiles = 16, 96 * size * size // (4096 // channels)
        found.append(
            Specialisation(
                shape=(96, size, size, channels),
                storage="fp32",
                signature={"partials_ptr": "*fp32", "sums_ptr": "*fp64", "tiles": "i32"},
                constants={
                    "C": channels,
                    "BLOCK_C": channels,
                    "BLOCK_T": _BLOCK_TILES * 16 // channels,
                },
                num_warps=_WARPS,
                programs=items,
                bytes=items * channels * (tiles * 12 + 16),
                trips=2 * tiles / (_BLOCK_TILES * 16 // channels),
                note=f"{items} items",
            )
        )
    return found


register(
    "fold",
    _fold_kernel,
    reference="Reference._store",
    maths="mean, variance of [count, mean, second moment] by tile",
    why="512 sums of 4 warps are 4 a thread; few programs, so short loops",
    specialisations=_specialisations,
)
