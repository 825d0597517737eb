"""Beta-decay and Dirichlet sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.genotype import check_genotype, load_genotype
from pdarts_fast.search_space import all_switches
from pdarts_fast.strategies.beta_decay import BetaDecay, beta_weight
from pdarts_fast.strategies.dirichlet import DirichletMixing, concentration
from pdarts_fast.strategies.pdarts import PDarts
from pdarts_fast.supernet import Network


def test_beta_decay_is_the_mean_logsumexp_of_an_edge() -> None:
    torch.manual_seed(0)
    alphas = [torch.randn(14, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    term = BetaDecay().double()
    term.weight.fill_(3.0)
    value = term(alphas)
    wanted = 3 * np.mean([np.log(np.exp(row).sum()) for a in alphas for row in a.detach().numpy()])
    assert value.item() == pytest.approx(wanted, rel=1e-12)
    # Its gradient is the softmax: it pulls down what is high.
    for alpha, gradient in zip(alphas, torch.autograd.grad(value, alphas), strict=True):
        torch.testing.assert_close(gradient, 3 / 28 * alpha.detach().softmax(1))


def test_beta_decay_counts_active_columns_only() -> None:
    active = torch.tensor([True, False, True])
    term = BetaDecay(active)
    term.weight.fill_(1.0)
    alphas = torch.tensor([[1.0, 50.0, 2.0]], requires_grad=True)
    value = term([alphas])
    assert value.item() == pytest.approx(np.log(np.exp(1) + np.exp(2)), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, alphas)
    assert gradient[0, 1] == 0


@pytest.mark.parametrize(
    ("epoch", "epochs", "wanted"),
    [(-1, 15, 0.0), (0, 15, 0.0), (7, 15, 25.0), (14, 15, 50.0), (0, 1, 50.0)],
    ids=["warm-up", "first", "middle", "last", "only"],
)
def test_beta_ramps_over_the_alpha_epochs(epoch: int, epochs: int, wanted: float) -> None:
    assert beta_weight(50.0, epoch, epochs) == wanted


def test_the_weight_of_beta_decay_changes_in_place(tools: Any) -> None:
    config = tools.settings("--preset", "demo", "--beta-decay", 6)
    strategy = PDarts(config, torch.device("cpu"))
    network = Network(1, 10, 3, torch.nn.functional.cross_entropy, backend="reference")
    strategy.start_stage(network, all_switches(), resumed=False)
    term, seen = strategy.alpha_term, []
    assert term is not None
    for epoch in range(config.epochs):
        strategy.set_epoch(epoch)
        seen.append(term([torch.zeros(14, 8)] * 2).item() / np.log(8))
    assert strategy.alpha_term is term
    assert seen == pytest.approx([0, 0, 3, 6])


def test_dirichlet_weights_have_the_mean_of_their_concentration() -> None:
    torch.manual_seed(1)
    alphas = torch.tensor([[-2.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    mixing = DirichletMixing()
    beta = concentration(alphas)
    torch.testing.assert_close(beta[0], torch.tensor([float(np.exp(-2)), 1.0, 2.0]))
    draws = torch.stack([mixing("normal", alphas) for _ in range(4000)])
    torch.testing.assert_close(draws.sum(-1), torch.ones(4000, 2))
    mean = beta / beta.sum(1, keepdim=True)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.015, rtol=0)
    total = beta.sum(1, keepdim=True)
    torch.testing.assert_close(draws.var(0), mean * (1 - mean) / (total + 1), atol=0.01, rtol=0)
    mixing.eval()
    torch.testing.assert_close(mixing("normal", alphas), mean)


def test_dirichlet_gradients_are_those_of_the_mean_on_average() -> None:
    torch.manual_seed(2)
    alphas = torch.tensor([[-1.0, 0.2, 0.9]], requires_grad=True)
    mixing = DirichletMixing()
    costs = torch.tensor([1.0, -2.0, 3.0])
    grads = [
        torch.autograd.grad((mixing("normal", alphas) * costs).sum(), alphas)[0]
        for _ in range(4000)
    ]
    mixing.eval()
    (wanted,) = torch.autograd.grad((mixing("normal", alphas) * costs).sum(), alphas)
    torch.testing.assert_close(torch.stack(grads).mean(0), wanted, atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "flags", [["--beta-decay", 2], ["--sample", "dirichlet"]], ids=["beta-decay", "dirichlet"]
)
def test_a_search_with_a_remedy_ends_in_a_valid_genotype(
    flags: list[Any], search: Any, finished: Any
) -> None:
    stages = "--cells 3 3 --ops-kept 8 3 --skip-dropout 0 --epochs 3"
    run, plain = search("run", *flags, stages=stages), finished(stages=stages)
    genotype = load_genotype(run)
    assert check_genotype(genotype) == genotype
    assert (run / "alphas.json").read_bytes() != (plain / "alphas.json").read_bytes()


def test_beta_decay_flattens_the_alphas(search: Any, tools: Any) -> None:
    stage = "--cells 3 --ops-kept 8 --skip-dropout 0 --epochs 4 --alpha-lr 0.05"
    runs = [search(f"run{weight}", "--beta-decay", weight, stages=stage) for weight in (0, 100)]
    before, after = (tools.records(run, "epoch")[-1]["entropy_normal"] for run in runs)
    assert after > before + 1e-3
