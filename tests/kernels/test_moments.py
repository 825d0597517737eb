"""BatchNorm by moments against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pdarts_fast.kernels import moments
from pdarts_fast.operations import BN_EPS, BN_MOMENTUM


def test_constants_are_those_of_the_stock_modules() -> None:
    assert (moments.EPS, moments.MOMENTUM) == (BN_EPS, BN_MOMENTUM)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_fold_and_its_backward(training: bool) -> None:
    torch.manual_seed(0)
    count, channels = 50, 6
    y = (3 * torch.randn(count, channels) + 5).double().requires_grad_()
    g = torch.randn(count, channels).double()
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.randn(channels).double(), torch.rand(channels).double() + 0.5
    out = alpha * F.batch_norm(y, mean.clone(), variance.clone(), training=training)
    dy, d_alpha = torch.autograd.grad(out, [y, alpha], g)
    if training:
        mean, variance = y.detach().mean(0), y.detach().var(0, unbiased=False)
    norm = moments.normalisation(torch.stack([mean, variance])[None])
    normalised = y.detach() * norm[0, 0] + norm[0, 1]
    torch.testing.assert_close(alpha.detach() * normalised, out.detach(), rtol=1e-12, atol=1e-12)
    products = (g * normalised).sum(0)
    torch.testing.assert_close(products.sum(), d_alpha)
    factor = alpha.detach().view(1, 1)
    coef = moments.backward_coefficients(
        factor, norm, g.sum(0), products[None], count, training=training
    )[0]
    got = coef[0] * g + coef[1] * y.detach() + coef[2]
    torch.testing.assert_close(got, dy, rtol=1e-10, atol=1e-12)


def test_running_variance_is_unbiased() -> None:
    y = torch.randn(9, 4).double()
    torch.testing.assert_close(moments.unbiased(y.var(0, unbiased=False), 9), y.var(0))
    assert moments.unbiased(torch.ones(1), 1).isfinite().all()
