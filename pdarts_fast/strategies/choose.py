"""Which strategy a configuration asks for."""

from __future__ import annotations

import torch

from pdarts_fast.config import SearchConfig
from pdarts_fast.strategies.base import Strategy
from pdarts_fast.strategies.opp import Opp
from pdarts_fast.strategies.pdarts import PDarts
from pdarts_fast.strategies.rapdarts import Costs, RapDarts


def make_strategy(
    config: SearchConfig, device: torch.device, costs: Costs | None = None
) -> Strategy:
    """The strategy of a search.

    Args:
        config: A validated configuration.
        device: Where the supernet runs.
        costs: Of its targets; None without targets.
    """
    if config.strategy == "opp":
        return Opp(config, device)
    if costs is not None:
        return RapDarts(config, device, costs)
    return PDarts(config, device)
