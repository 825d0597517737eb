"""Stand-ins for the supernet: quick ones, and one in which no image depends on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdarts_fast.skip_dropout import DropoutControl, SkipDropout
from pdarts_fast.supernet import Network


class ToyNetwork(nn.Module):
    """Has all state that the supernet has: weights, BatchNorm statistics, alphas, dropout.

    Arguments and attributes are those of `pdarts_fast.supernet.Network`.
    """

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Callable[[Tensor, Tensor], Tensor],
        *,
        switches_normal: Any = (),
        switches_reduce: Any = (),
        p: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.p = p
        self.stem = nn.Sequential(nn.Conv2d(3, 4 * C, 3, bias=False), nn.BatchNorm2d(4 * C))
        self.skip_dropout = DropoutControl(p, torch.initial_seed())
        self.dropout = SkipDropout(self.skip_dropout, 0) if p > 0 else nn.Identity()
        self.classifier = nn.Linear(4 * C, num_classes)
        self.switches = {"normal": np.array(switches_normal), "reduce": np.array(switches_reduce)}
        self.alphas_normal, self.alphas_reduce = (
            nn.Parameter(torch.tensor(1e-3 * np.random.randn(14, table[0].sum())).float())
            for table in self.switches.values()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0:
            self.skip_dropout.advance()
        x = self.dropout(self.stem(x)).relu().mean((2, 3))
        for alphas in self.arch_parameters():
            weights = torch.softmax(alphas, 1).flatten()
            x = x * (1 + weights @ torch.linspace(-1, 1, len(weights)))
        return self.classifier(x)

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alphas_normal, self.alphas_reduce]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("alphas")]

    def update_p(self) -> None:
        self.skip_dropout.set_rate(self.p)

    @property
    def dropout_state(self) -> Tensor:
        return self.skip_dropout.state


class PlainNetwork(ToyNetwork):
    """Without BatchNorm: what a batch gives is the mean of what its parts give."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stem[1] = nn.Identity()


class PerImageNorm(nn.BatchNorm2d):
    """Has the state of a BatchNorm and normalises each image by itself.

    The large epsilon keeps rounding errors of nearly constant images from growing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[1:], eps=0.1)


class PlainSupernet(Network):
    """The supernet with all its operations; what a batch gives is the mean of its parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = PerImageNorm
