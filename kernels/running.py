"""Running statistics of a cell's BatchNorms, by operators of torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import moments
from .interface import WholeCell
from .plan import Plan


@lru_cache(maxsize=256)
def _bessel(slots: int, counts: tuple[int, int], device: torch.device) -> Tensor:
    """What turns statistics of a batch into those that running ones average, ``[rows, 2, 1]``.

    Kept on the device: filled there in every step it would be several launches.
    """
    factors = torch.ones(slots + 2, 2, 1, dtype=torch.float64)
    factors[:slots, 1] = moments.unbiased(factors[:slots, 1], counts[0])
    factors[slots:, 1] = moments.unbiased(factors[slots:, 1], counts[1])
    return factors.to(device)


def move_statistics(
    plan: Plan,
    running: list[Tensor],
    batches: list[Tensor],
    stats: Tensor,
    counts: list[int],
    whole: WholeCell | None = None,
) -> None:
    """Moves running means and variances (alternately, by norm) towards those of the batch.

    Args:
        plan: The cell.
        running: ``[C]`` each.
        batches: Counters, int64 scalars.
        stats: float64 ``[slots + 2, 2, C]``: mean and biased variance.
        counts: M of the cell's slots, and of its preprocessed inputs.
        whole: What may do it in one call.
    """
    if whole is not None and whole.move_running(plan, running, batches, stats, counts):
        return
    factors = _bessel(plan.num_slots, (counts[0], counts[1]), stats.device)
    kept = stats[..., : plan.channels]
    targets = torch.empty(kept.shape, dtype=running[0].dtype, device=stats.device)
    torch.mul(kept, factors, out=targets)
    flat = targets.flatten(0, 1).unbind()
    picked = [flat[2 * slot + i] for slot in plan.norm_slots for i in (0, 1)]
    torch._foreach_lerp_(running, picked, moments.MOMENTUM)
    torch._foreach_add_(batches, 1)


def running_moments(plan: Plan, running: list[Tensor], channels: int) -> Tensor:
    """Running means and variances as float64 ``[norms, 2, C]``."""
    stats = running[0].new_zeros(len(plan.norms), 2, channels, dtype=torch.float64)
    for i in range(len(plan.norms)):
        stats[i, 0, : plan.channels] = running[2 * i]
        stats[i, 1, : plan.channels] = running[2 * i + 1]
    return stats
