"""Whole passes of a cell in one call of its backend: which cells, and the masks of their skips."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pdarts_fast.cells.context import Context, Stored
from pdarts_fast.cells.plan import CellPlan
from pdarts_fast.kernels.cell_operator import any_cell
from pdarts_fast.kernels.cell_pass import Saved
from pdarts_fast.kernels.interface import AnyCell, Arrays, Backend, Masks


def fits(plan: CellPlan) -> bool:
    """Whether a plan is made of what the supernet's own cells are made of."""
    return not (plan.affine or plan.outside or plan.extras or plan.bare)


def find(context: Context, backend: str, dtype: torch.dtype) -> AnyCell | None:
    """What runs a call of a cell as a whole; None if it runs primitive by primitive.

    Args:
        context: The call.
        backend: Name of a backend.
        dtype: Of the arrays.
    """
    rates = context.rates
    if not fits(context.plan) or context.drop_path > 0 or any(rate >= 1 for rate in rates.values()):
        return None
    # Masks are numbered by the plan: all of them, or none.
    if rates and len(rates) != len(context.plan.masks):
        return None
    return any_cell(backend, dtype)


def saved(stored: Stored) -> Saved:
    """The arrays of a pass as a whole pass takes them."""
    inputs, states = stored.inputs, stored.states
    return Saved(
        (inputs[0], inputs[1]), (states[0], states[1]), stored.nodes, stored.slots, stored.norms
    )


@lru_cache(maxsize=256)
def _factor(rate: float, dtype: torch.dtype) -> float:
    """What dropout multiplies by where it keeps an element, rounded as torch rounds it."""
    return float(torch.ones(1, dtype=dtype).div_(1 - rate))


def draw(context: Context, cell: AnyCell, backend: Backend, slots: Tensor) -> Masks | None:
    """Masks of all skips of a cell, as the unmodified cell draws them one by one.

    Args:
        context: The call; without custom operations nothing else draws within it.
        cell: Draws, unless it cannot draw what torch draws.
        backend: Makes the array.
        slots: ``Stored.slots``.
    """
    plan, rates = context.plan, context.rates
    if not rates:
        return None
    _, *pixels, padded = slots.shape
    by_number = [rates[place] for place in plan.masks]
    kept = backend.empty((len(by_number), *pixels, padded), slots, torch.uint8)
    if not cell.draw(kept, plan.channels, [1 - rate for rate in by_number]):
        batch, *sides = pixels
        kept[..., plan.channels :].zero_()
        for mask, rate in zip(kept, by_number, strict=True):
            image = slots.new_empty((batch, plan.channels, *sides), dtype=context.image_dtype)
            mask[..., : plan.channels] = image.bernoulli_(1 - rate).permute(0, 2, 3, 1)
    factors = [_factor(rate, context.image_dtype) for rate in by_number]
    return Masks(kept, torch.tensor(factors, dtype=torch.float64))


def forward(
    cell: AnyCell, plan: CellPlan, stored: Stored, shared: Arrays, alphas: Tensor
) -> Tensor:
    """What ``CellForward.run`` does; returns its ``stats``."""
    stats = torch.empty_like(stored.norms[: plan.num_slots + 2])
    cell.forward(plan, saved(stored), shared, alphas, stats)
    return stats
