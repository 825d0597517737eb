"""BatchNorm by channel moments: from batch statistics to the numbers the primitives apply.

For y ``[M, C]`` with batch mean m, biased variance v and r = (v + eps)^-1/2, a branch adds
``alpha * BN(y) = (alpha r) y - alpha r m`` to its node, so a node is one weighted sum of its y's
plus one constant vector. Backward, with g the gradient of the node, gbar = mean(g) and
s = mean(g * BN(y)):

    dalpha = M * sum(s)
    dy     = alpha r (g - gbar - BN(y) s) = (alpha r) g - (alpha r^2 s) y + alpha r (r s m - gbar)

In evaluation mode m and v are constants, and dy is ``(alpha r) g`` alone. All of this is float64:
a handful of C-sized vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.1


def reciprocal_deviation(variance: Tensor) -> Tensor:
    """``(variance + eps)^-1/2``."""
    return (variance + EPS).rsqrt()


def normalisation(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of ``BN(y) = y * scale + shift``, each of the shape of ``mean``."""
    scale = reciprocal_deviation(variance)
    return scale, -mean * scale


def backward_coefficients(
    alpha: Tensor,
    mean: Tensor,
    variance: Tensor,
    sum_grad: Tensor,
    sum_grad_normalised: Tensor,
    count: int,
    *,
    training: bool,
) -> Tensor:
    """``dy = c[0] * g + c[1] * y + c[2]`` of BatchNorms that share M.

    Args:
        alpha: Factor behind the BatchNorm, ``[n, 1]``.
        mean: ``[n, C]``.
        variance: Biased, ``[n, C]``.
        sum_grad: Sum of g over the batch, ``[n, C]`` or ``[C]``.
        sum_grad_normalised: Sum of ``g * BN(y)`` over the batch, ``[n, C]``.
        count: M.
        training: Whether mean and variance are those of the batch.

    Returns:
        ``[n, 3, C]``.
    """
    scale = reciprocal_deviation(variance)
    first = alpha * scale
    if not training:
        zero = torch.zeros_like(first)
        return torch.stack([first, zero, zero], dim=1)
    spread = first * scale * (sum_grad_normalised / count)
    return torch.stack([first, -spread, spread * mean - first * sum_grad / count], 1)


def input_backward_coefficients(
    variance: Tensor, sum_grad: Tensor, sum_grad_normalised: Tensor, count: int, *, training: bool
) -> Tensor:
    """As ``backward_coefficients`` with alpha 1, in terms of BN(y), which is stored in place of y.

    Args:
        variance, sum_grad, sum_grad_normalised: ``[C]`` each.

    Returns:
        ``[3, C]`` such that ``dy = c[0] * g + c[1] * BN(y) + c[2]``.
    """
    scale = reciprocal_deviation(variance)
    if not training:
        zero = torch.zeros_like(scale)
        return torch.stack([scale, zero, zero])
    return torch.stack([scale, -scale * sum_grad_normalised / count, -scale * sum_grad / count])


def unbiased(variance: Tensor, count: int) -> Tensor:
    """The variance that running statistics average: ``variance * M / (M - 1)``."""
    return variance * (count / max(count - 1, 1))
