"""BatchNorm by channel moments: from batch statistics to the numbers the primitives apply.

For y ``[M, C]`` with batch mean m, biased variance v and r = (v + eps)^-1/2, a branch adds
``alpha * BN(y) = (alpha r) y - alpha r m`` to its node, so a node is one weighted sum of its y's
plus one constant vector. Backward, with g the gradient of the node, gbar = mean(g) and
s = mean(g * BN(y)):

    dalpha = M * sum(s)
    dy     = alpha r (g - gbar - BN(y) s) = (alpha r) g - (alpha r^2 s) y - alpha r (gbar - r m s)

In evaluation mode m and v are constants, and dy is ``(alpha r) g`` alone. All of this is float64:
a handful of C-sized vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.1


def normalisation(moments: Tensor) -> Tensor:
    """Scale r and shift ``-r m`` of ``BN(y) = y * scale + shift``.

    Args:
        moments: Mean and biased variance, ``[n, 2, C]``.

    Returns:
        ``[n, 2, C]``.
    """
    mean, variance = moments.unbind(1)
    scale = (variance + EPS).rsqrt()
    return torch.stack([scale, -scale * mean], dim=1)


def backward_coefficients(
    factor: Tensor | None,
    norm: Tensor,
    sum_grad: Tensor,
    sum_product: Tensor,
    count: int,
    *,
    training: bool,
) -> Tensor:
    """``dy = c[0] * g + c[1] * y + c[2]`` of BatchNorms that share M.

    Args:
        factor: alpha behind the BatchNorm, ``[n, 1]``; None for 1.
        norm: Scale and shift, ``[n, 2, C]``.
        sum_grad: Sum of g over the batch, ``[n, C]`` or ``[C]``.
        sum_product: Sum of ``g * BN(y)`` over the batch, ``[n, C]``.
        count: M.
        training: Whether the moments are those of the batch.

    Returns:
        ``[n, 3, C]``.
    """
    scale, shift = norm.unbind(1)
    first = scale if factor is None else factor * scale
    if not training:
        zero = torch.zeros_like(first)
        return torch.stack([first, zero, zero], dim=1)
    s = sum_product / count
    second = -first * s
    third = second * shift - first * (sum_grad / count)
    return torch.stack([first, second * scale, third], dim=1)


def unbiased(variance: Tensor, count: int) -> Tensor:
    """The variance that running statistics average: ``variance * M / (M - 1)``."""
    return variance * (count / max(count - 1, 1))
