"""Beta-decay: the alpha loss also holds the mean logsumexp of the alphas of an edge.

Source: beta-DARTS (arXiv 2203.01665), section 3; the ramp over a stage is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def beta_weight(weight: float, epoch: int, epochs: int) -> float:
    """Weight in an alpha epoch: from 0 in the first to ``weight`` in the last, linearly.

    Args:
        weight: Weight of the last alpha epoch.
        epoch: 0-based number among the alpha epochs; negative before them.
        epochs: Alpha epochs of the stage.
    """
    if epoch < 0:
        return 0.0
    return weight * epoch / (epochs - 1) if epochs > 1 else weight


class BetaDecay(nn.Module):
    """``weight * mean_e logsumexp_k alphas[e, k]`` over the edges of both cell types.

    Args:
        active: bool [k], which columns count; None for all. Changes in place.

    Attributes:
        weight: float32 scalar; changes in place.
    """

    weight: Tensor

    def __init__(self, active: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))
        self._active = active

    def forward(self, alphas: Sequence[Tensor]) -> Tensor:
        """The term, a scalar, from both alphas [edges, k]."""
        table = torch.cat(list(alphas))
        if self._active is not None:
            table = table.masked_fill(~self._active, -float("inf"))
        return self.weight * table.logsumexp(dim=1).mean()
