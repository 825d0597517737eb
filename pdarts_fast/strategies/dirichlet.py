"""Weights of an edge's operations drawn from a Dirichlet distribution.

Source: DrNAS (arXiv 2006.10355), section 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Dirichlet


def concentration(alphas: Tensor) -> Tensor:
    """``elu(alpha) + 1``: positive, 1 at 0."""
    return F.elu(alphas) + 1


class DirichletMixing(nn.Module):
    """In training ``w ~ Dirichlet(elu(alpha) + 1)`` on every edge, else its mean.

    A draw takes torch's random state of the device, so it is part of every checkpoint; gradients
    reach the alphas along the path of the draw.
    """

    def forward(self, kind: str, alphas: Tensor) -> Tensor:
        """Weights [edges, k] from alphas [edges, k]; rows add up to 1."""
        beta = concentration(alphas)
        if not self.training:
            return beta / beta.sum(dim=-1, keepdim=True)
        return Dirichlet(beta, validate_args=False).rsample()
