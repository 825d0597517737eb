"""From partial sums of the backward pass to the coefficients of dy.

With g the gradient behind a BatchNorm, M its pixels, r and b its scale and shift, f its factor:

    p = sum(g BN(y)) / M,    q = sum(g) / M
    dy = c0 g + c1 y + c2,    c0 = f r,    c1 = -f r^2 p,    c2 = -f r (q + b p)
    dalpha = sum of sum(g BN(y)) over channels

f is alpha for what enters a node and 1 for a first half. A preprocessed input is stored
normalised, so there ``c1 = -r p`` and ``c2 = -r q``. A skip has c0 = alpha and no more. In
evaluation c1 and c2 are 0. Sums are in the order of the parts.

What enters a node has few parts: the kernel that first uses its coefficients computes them, in
float32, and writes them for others (``entering``, ``write_entering``). Other calls are a launch of
their own, in float64.

Reference: ``moments.backward_coefficients`` and the algebra of ``cell_backward``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, TILE_SCALE
from .record import search_specialisations
from .registry import Specialisation, register
from .sums import ELEMENTS, sum_row

# The interpreter wants few programs.
_BLOCK_C = 16 if INTERPRETED else 4


@triton.jit(do_not_specialize=["parts", "pixels"])
def _coefficients_kernel(
    partials_ptr, norms_ptr, alphas_ptr, coef_ptr, grad_alphas_ptr, table_ptr, parts, pixels,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, STORED: tl.constexpr,
    TRAINING: tl.constexpr,
):  # fmt: skip
    """Program (item, block of channels). partials [rows, parts, C] float32. STORED: y is stored
    normalised.

    The table holds the rows of partials that are summed to sum(g) and to sum(g BN(y)), the row in
    norms (-1: skip), the alpha (-1: 1), the row in coef and the alpha that gets a gradient (-1).
    Parts are read 16 bytes at a time; what follows them are single numbers of 4 channels.
    """
    row = table_ptr + tl.program_id(0) * 16
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = c < C
    at = tl.load(row + 1).to(tl.int64) * parts * C
    product = sum_row(partials_ptr + at, parts, c, C, BLOCK_C, BLOCK)
    norm, which, to = tl.load(row + 2), tl.load(row + 3), tl.load(row + 5)
    has_norm = (norm >= 0) & m_c
    place = norms_ptr + tl.maximum(norm, 0) * (2 * C) + c
    scale = tl.load(place, mask=has_norm, other=1.0)
    first = scale
    if which >= 0:
        first *= tl.load(alphas_ptr + which).to(tl.float64)
    out = coef_ptr + tl.load(row + 4) * (3 * C) + c
    second = tl.zeros([BLOCK_C], dtype=tl.float64)
    third = tl.zeros([BLOCK_C], dtype=tl.float64)
    if TRAINING:
        first_at = tl.load(row).to(tl.int64) * parts * C
        gradient = sum_row(partials_ptr + first_at, parts, c, C, BLOCK_C, BLOCK) / pixels
        s = -first * (product / pixels)
        if STORED:
            second = s
            third = -first * gradient
        else:
            second = s * scale
            third = s * tl.load(place + C, mask=has_norm, other=0.0) - first * gradient
    tl.store(out, first.to(tl.float32), mask=m_c)
    tl.store(out + C, second.to(tl.float32), mask=m_c)
    tl.store(out + 2 * C, third.to(tl.float32), mask=m_c)
    if (to >= 0) & (tl.program_id(1) == 0):
        total = tl.sum(product, 0)
        for block in range(1, C // BLOCK_C):
            more = sum_row(partials_ptr + at, parts, c + block * BLOCK_C, C, BLOCK_C, BLOCK)
            total += tl.sum(more, 0)
        tl.store(grad_alphas_ptr + to, total.to(grad_alphas_ptr.dtype.element_ty))


@triton.jit
def _few(base, parts, c, m_c, C: tl.constexpr, PARTS: tl.constexpr):
    """Sum of few parts of float32 [parts, C], float32 [BLOCK_C]."""
    b = tl.arange(0, PARTS)
    acc = tl.zeros([PARTS, c.shape[0]], dtype=tl.float32)
    for first in range(0, parts, PARTS):
        p = first + b
        m = (p < parts)[:, None] & m_c[None, :]
        acc += tl.load(base + p[:, None] * C + c[None, :], mask=m, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def entering(
    row, partials_ptr, norms_ptr, alphas_ptr, parts, pixels, c, m_c,
    C: tl.constexpr, PARTS: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """c0, c1, c2 of the item of a table's row, and sum(g BN(y)), float32 [BLOCK_C] each."""
    product = _few(partials_ptr + tl.load(row + 1) * parts * C, parts, c, m_c, C, PARTS)
    norm = tl.load(row + 2)
    has_norm = (norm >= 0) & m_c
    place = norms_ptr + tl.maximum(norm, 0) * (2 * C) + c
    scale = tl.load(place, mask=has_norm, other=1.0).to(tl.float32)
    first = scale * tl.load(alphas_ptr + tl.load(row + 3))
    second = tl.zeros([c.shape[0]], dtype=tl.float32)
    third = tl.zeros([c.shape[0]], dtype=tl.float32)
    if TRAINING:
        gradient = _few(partials_ptr + tl.load(row) * parts * C, parts, c, m_c, C, PARTS) / pixels
        s = -first * (product / pixels)
        second = s * scale
        shift = tl.load(place + C, mask=has_norm, other=0.0).to(tl.float32)
        third = s * shift - first * gradient
    return first, second, third, product


@triton.jit
def write_entering(
    table_ptr, count, partials_ptr, norms_ptr, alphas_ptr, coef_ptr, grad_alphas_ptr, parts, pixels,
    c, m_c, C: tl.constexpr, PARTS: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Writes what ``entering`` returns of all rows: every program of a 2-d grid its share."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    for item in range(tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), count, programs):
        row = table_ptr + item * 16
        first, second, third, product = entering(
            row, partials_ptr, norms_ptr, alphas_ptr, parts, pixels, c, m_c, C, PARTS, TRAINING
        )  # fmt: skip
        out = coef_ptr + tl.load(row + 4) * (3 * C) + c
        tl.store(out, first, mask=m_c)
        tl.store(out + C, second, mask=m_c)
        tl.store(out + 2 * C, third, mask=m_c)
        tl.store(grad_alphas_ptr + tl.load(row + 5), tl.sum(product, 0))


@dataclass(frozen=True)
class Entering:
    """What ``write_entering`` needs of the items that enter a node; as for ``coefficients``.

    Attributes:
        partials, norms, alphas, grad_alphas, table, training: As there; every row has an alpha.
    """

    partials: Tensor
    norms: Tensor
    alphas: Tensor
    grad_alphas: Tensor
    table: Tensor
    training: bool


def coefficients(
    partials: Tensor,
    norms: Tensor,
    alphas: Tensor,
    coef: Tensor,
    grad_alphas: Tensor,
    table: Tensor,
    pixels: int,
    *,
    training: bool,
    stored: bool = False,
) -> None:
    """Writes coefficients, and gradients of alphas, of the items of a table.

    Args:
        partials: float32 ``[rows, parts, C]``, contiguous.
        norms: Scale and shift, float64 ``[rows, 2, C]``.
        alphas: float32 ``[edges * ops]``.
        coef: float32 ``[rows, 3, C]``, written.
        grad_alphas: float32 ``[edges * ops]``, written.
        table: int32 ``[items, 16]``, see the kernel.
        pixels: M.
        training: Whether the norms depend on y.
        stored: Whether y is stored normalised.
    """
    channels = partials.shape[-1]
    _coefficients_kernel[(len(table), channels // _BLOCK_C)](
        partials, norms, alphas, coef, grad_alphas, table, partials.shape[1], pixels,
        C=channels, BLOCK_C=_BLOCK_C, BLOCK=ELEMENTS // _BLOCK_C * TILE_SCALE, STORED=stored,
        TRAINING=training,
    )  # fmt: skip


def _specialisations() -> list[Specialisation]:
    return search_specialisations(_coefficients_kernel, gathers=True)


register(
    "coefficients",
    _coefficients_kernel,
    reference="moments.backward_coefficients",
    maths="c0 = f r, c1 = -f r^2 p, c2 = -f r (q + b p)",
    why="a program for 4 channels, 16 bytes a part: items are few and parts a few hundred",
    specialisations=_specialisations,
)
