"""The step of a search or training as one that several ranks do together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn

from pdarts_fast.distributed import Ranks, digest_of
from pdarts_fast.meter import Meter


class SharedStep(Protocol):
    """What several ranks need of a step."""

    network: Any
    average_gradients: Callable[[Iterable[nn.Parameter]], None]
    epoch_meter: Meter
    interval_meter: Meter


def share_step(step: SharedStep, ranks: Ranks) -> None:
    """Make a step, new or from a checkpoint, one that several ranks do together.

    Raises:
        RunError: The ranks do not begin with the same weights and alphas.
    """
    step.average_gradients = ranks.average_gradients
    if not ranks.is_first:
        # The sums in a checkpoint are those of all ranks: rank 0 has them.
        step.epoch_meter.reset()
        step.interval_meter.reset()
    require_same(step.network, ranks)


def collect_state(step: SharedStep, ranks: Ranks) -> None:
    """Bring what the ranks have apart, sums and running statistics, to rank 0 for a checkpoint."""
    ranks.collect(step.epoch_meter.sums, step.interval_meter.sums)
    ranks.average_statistics(step.network)


def require_same(network: nn.Module, ranks: Ranks) -> None:
    """Check that all ranks have the same parameters, bit for bit.

    Raises:
        RunError: They have not.
    """
    if ranks.size > 1:
        ranks.require_equal("the weights and alphas", digest_of(network))
