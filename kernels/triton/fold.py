"""Moments of tiles to moments of the batch, and to what they make of BatchNorm: one launch a call.

With count m, mean a and centred second moment s of every tile:

    mean = sum(m a) / M,    variance = sum(s + m a^2) / M - mean^2,    M = sum(m)

in float64 and in the order of the tiles, so results are repeatable; float64 has the digits that
the difference loses, float32 means do not. From there, with r = (variance + eps)^-1/2:

    norms  = r, -r mean                              saved for the backward pass, float64
    scales = alpha r,  shifts = -alpha r mean        float32, one row for each place that reads it

with an alpha of 1 for second halves and preprocessed inputs. In evaluation norms are given. A skip
has no moments, its row is alpha and 0.

Reference: ``Reference._store``, ``moments.normalisation`` and the algebra of ``cell_forward``.
Source: Chan, Golub, LeVeque 1979.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..moments import EPS
from .common import INTERPRETED, TILE_SCALE
from .registry import Specialisation, register

MOMENTS, TRAINING, EVALUATION = range(3)
_MOMENTS: tl.constexpr = tl.constexpr(MOMENTS)
_EVALUATION: tl.constexpr = tl.constexpr(EVALUATION)
_EPS: tl.constexpr = tl.constexpr(EPS)
# The interpreter wants few programs.
_BLOCK_C, _BLOCK_T, _WARPS = (16 if INTERPRETED else 4), 128, 4


@triton.jit
def _merge(partial, tiles, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """Mean and variance, float64 [1, BLOCK_C], of an item's tiles at ``partial``."""
    t = tl.arange(0, BLOCK_T)[:, None]
    count = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    square = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    for start in range(0, tiles, BLOCK_T):
        m = start + t < tiles
        tile = partial + (start + t) * (3 * C)
        weight = tl.load(tile, mask=m, other=0.0).to(tl.float64)
        mean = tl.load(tile + C, mask=m, other=0.0).to(tl.float64)
        within = tl.load(tile + 2 * C, mask=m, other=0.0).to(tl.float64)
        count += weight
        total += weight * mean
        square += within + weight * mean * mean
    pixels = tl.maximum(tl.sum(count, 0, keep_dims=True), 1.0)
    mean = tl.sum(total, 0, keep_dims=True) / pixels
    variance = tl.sum(square, 0, keep_dims=True) / pixels - mean * mean
    return mean, tl.maximum(variance, 0.0)


@triton.jit(do_not_specialize=["tiles"])
def _fold_kernel(
    partials_ptr, sums_ptr, norms_ptr, alphas_ptr, scales_ptr, shifts_ptr, table_ptr, tiles,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Program (item, block of channels). partials [n, tiles, 3, C] float32, sums [rows, 2, C].

    The table holds for every item its row in sums and norms, -1 for a skip, and the first and the
    last but one of the rows that say where its scale and shift go: an alpha, -1 for 1, and a row.
    Tiles are read 16 bytes at a time; what follows them are single numbers of 4 channels.
    """
    item = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    partial = partials_ptr + item.to(tl.int64) * tiles * (3 * C) + c
    if MODE == _MOMENTS:
        mean, variance = _merge(partial, tiles, C, BLOCK_C, BLOCK_T)
        tl.store(sums_ptr + item * (2 * C) + c, mean)
        tl.store(sums_ptr + item * (2 * C) + C + c, variance)
    else:
        row = tl.load(table_ptr + item * 16)
        has_norm = (row >= 0) & (c < C)
        at = tl.maximum(row, 0) * (2 * C) + c
        if MODE == _EVALUATION:
            scale = tl.load(norms_ptr + at, mask=has_norm, other=1.0)
            shift = tl.load(norms_ptr + at + C, mask=has_norm, other=0.0)
        else:
            mean, variance = _merge(partial, tl.where(row >= 0, tiles, 0), C, BLOCK_C, BLOCK_T)
            tl.store(sums_ptr + at, mean, mask=has_norm)
            tl.store(sums_ptr + at + C, variance, mask=has_norm)
            scale = tl.where(row >= 0, 1.0 / tl.sqrt(variance + _EPS), 1.0)
            shift = -scale * mean
            tl.store(norms_ptr + at, scale, mask=has_norm)
            tl.store(norms_ptr + at + C, shift, mask=has_norm)
        for to in range(tl.load(table_ptr + item * 16 + 1), tl.load(table_ptr + item * 16 + 2)):
            which = tl.load(table_ptr + to * 16)
            alpha = tl.load(alphas_ptr + tl.maximum(which, 0)).to(tl.float64)
            alpha = tl.where(which >= 0, alpha, 1.0)
            place = tl.load(table_ptr + to * 16 + 1) * C + c
            tl.store(scales_ptr + place, (alpha * scale).to(tl.float32))
            tl.store(shifts_ptr + place, (alpha * shift).to(tl.float32))


@dataclass(frozen=True)
class Norms:
    """What a pass of a cell keeps of its BatchNorms.

    Attributes:
        stats: Mean and variance, float64 ``[rows, 2, C]``.
        norms: ``Saved.norms``, of the same shape.
        alphas: float32 ``[edges * ops]``.
        scales, shifts: float32 ``[places, C]``.
    """

    stats: Tensor
    norms: Tensor
    alphas: Tensor
    scales: Tensor
    shifts: Tensor


def fold(partials: Tensor, sums: Tensor) -> None:
    """Writes mean and variance of every item.

    Args:
        partials: Count, mean and centred second moment of every tile, float32
            ``[n, tiles, 3, C]``; tiles of count 0 do not matter if they are finite.
        sums: float64 ``[n, 2, C]``, contiguous.
    """
    blank = [sums] + [partials] * 4
    _launch(partials, len(partials), sums, *blank, MOMENTS)


def fold_norms(partials: Tensor, norms: Norms, table: Tensor, items: int) -> None:
    """Writes what follows from the moments of a call's tiles.

    Args:
        partials: As for ``fold``; skips have none and come last.
        table: int32 ``[rows, 16]``, see the kernel.
        items: How many of its rows are programs.
    """
    arrays = (norms.norms, norms.alphas, norms.scales, norms.shifts, table)
    _launch(partials, items, norms.stats, *arrays, TRAINING)


def given_norms(norms: Norms, table: Tensor, items: int) -> None:
    """In evaluation: scales and shifts of all items of a cell from ``norms.norms``."""
    arrays = (norms.norms, norms.alphas, norms.scales, norms.shifts, table)
    _launch(norms.scales[None, :, None], items, norms.stats, *arrays, EVALUATION)


def _launch(partials: Tensor, items: int, *arrays: Any) -> None:
    *pointers, mode = arrays
    channels = partials.shape[-1]
    _fold_kernel[(items, channels // _BLOCK_C)](
        partials,
        *pointers,
        partials.shape[1],
        C=channels,
        BLOCK_C=_BLOCK_C,
        BLOCK_T=_BLOCK_T * TILE_SCALE,
        MODE=mode,
        num_warps=_WARPS,
    )


_POINTERS = {
    "partials_ptr": "*fp32",
    "sums_ptr": "*fp64",
    "norms_ptr": "*fp64",
    "alphas_ptr": "*fp32",
    "scales_ptr": "*fp32",
    "shifts_ptr": "*fp32",
    "table_ptr": "*i32",
    "tiles": "i32",
}


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        for mode, note in enumerate(("moments", "training", "evaluation")):
            items, tiles = 16, 96 * size * size // (4096 // channels)
            found.append(
                Specialisation(
                    shape=(96, size, size, channels),
                    storage="fp32",
                    signature=_POINTERS,
                    constants={
                        "C": channels,
                        "BLOCK_C": _BLOCK_C,
                        "BLOCK_T": _BLOCK_T,
                        "MODE": mode,
                    },
                    num_warps=_WARPS,
                    programs=items * channels // _BLOCK_C,
                    bytes=items * channels * (tiles * 12 + 16),
                    trips=tiles / _BLOCK_T,
                    gathers=mode != MOMENTS,
                    note=f"{items} items, {note}",
                )
            )
    return found


register(
    "fold",
    _fold_kernel,
    reference="Reference._store, moments.normalisation",
    maths="mean, variance of tiles; r, -r mean; alpha r, -alpha r mean",
    why="a program for 4 channels, 16 bytes a tile: items are few and tiles a few hundred",
    specialisations=_specialisations,
)
