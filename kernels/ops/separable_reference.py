"""Separable and dilated convolutions in plain torch: the specification of ``separable``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import moments


class NormState(NamedTuple):
    """What a BatchNorm (momentum 0.1, eps 1e-5) holds.

    Attributes:
        running_mean, running_var: ``[C]``; written in training.
        num_batches_tracked: int64 scalar, written in training; None to count nothing.
        weight, bias: gamma and beta, ``[C]``; None without.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> NormState:
        """Of a module.

        Raises:
            ValueError: Its momentum or eps is another, or it tracks no statistics.
        """
        usual = norm.momentum == moments.MOMENTUM and norm.eps == moments.EPS
        if not usual or norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"norm: wanted momentum {moments.MOMENTUM}, eps {moments.EPS} and running "
                f"statistics, got {norm}"
            )
        return cls(
            norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight, norm.bias
        )


def separable_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[NormState],
    *,
    stride: int,
    dilation: int,
    training: bool,
) -> Tensor:
    """``sep_conv`` (four weights) and ``dil_conv`` (two) in plain torch: the specification."""
    for half, norm in enumerate(norms):
        depthwise, pointwise = weights[2 * half : 2 * half + 2]
        padding = dilation * (depthwise.shape[-1] - 1) // 2
        step = stride if half == 0 else 1
        x = F.conv2d(torch.relu(x), depthwise, None, step, padding, dilation, x.shape[1])
        x = F.batch_norm(
            F.conv2d(x, pointwise),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training,
            moments.MOMENTUM,
            moments.EPS,
        )
        if training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    return x
