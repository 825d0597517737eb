"""Element-wise dropout behind the skip connections of a supernet.

One ``DropoutControl`` a network holds what all of its dropouts read: the rate and the random
state, as device tensors, so that a captured graph reads their values at replay. It is a module
that all dropouts share as a child: moving, deep-copying and replicating a network keep it shared.

Source: arXiv 1904.12760, section 3.3 (operation-level dropout).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pdarts_fast.kernels import philox


class DropoutControl(nn.Module):
    """Rate and random state of a network's skip dropouts; neither shows in ``state_dict``.

    Attributes:
        p: Dropout rate, float32 ``[1]``, whatever dtype the network is converted to.
        state: Seed and step, int64 ``[2]``.

    Args:
        p: Dropout rate to begin with.
        seed: Seed of all masks; taken modulo 2**64.
    """

    p: Tensor
    state: Tensor

    def __init__(self, p: float, seed: int) -> None:
        super().__init__()
        signed_seed = (seed + 2**63) % 2**64 - 2**63
        rate = torch.tensor([p], dtype=torch.float32)
        self.register_buffer("p", rate, persistent=False)
        state = torch.tensor([signed_seed, 0], dtype=torch.int64)
        self.register_buffer("state", state, persistent=False)

    def set_rate(self, p: float) -> None:
        """Writes a new rate in place, where a captured graph finds it."""
        self.p.fill_(p)

    def advance(self) -> None:
        """Moves every mask on by one step, in place."""
        self.state[1].add_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropoutControl:
        rate = self.p
        super()._apply(fn, recurse)
        # Masks compare 24-bit numbers with p: a half-precision network must not round it.
        self.p = rate.to(self.p.device)
        return self


class SkipDropout(nn.Module):
    """``x * keep / (1 - p)`` in training, ``x`` in evaluation; the mask is that of ``philox``.

    Args:
        control: Rate and random state, shared by the whole network.
        stream: Which random stream: ``cell index * 64 + edge index``.
    """

    def __init__(self, control: DropoutControl, stream: int) -> None:
        super().__init__()
        self.control = control
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return philox.dropout(x, self.control.p, self.control.state, self.stream)

    def extra_repr(self) -> str:
        return f"stream={self.stream}"
