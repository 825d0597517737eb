"""OPP-DARTS: which operation comes when, what an addition keeps and resets, an exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.alphas import load_alphas
from pdarts_fast.config import SearchConfig, preset
from pdarts_fast.data import Augmentation, ResidentLoader, split_indices
from pdarts_fast.distributed import SINGLE
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import PRIMITIVES, check_genotype, load_genotype
from pdarts_fast.search_space import derive
from pdarts_fast.step import SearchStep
from pdarts_fast.strategies.base import Trials
from pdarts_fast.strategies.opp import (
    FIRST_OPS,
    TRIED_OPS,
    ActiveOps,
    Opp,
    due_additions,
    learning_rate,
    renew,
    reset_optimizer,
    trial_loss,
)
from pdarts_fast.supernet import Network

CPU = torch.device("cpu")


@pytest.fixture
def network(one_thread: None) -> Network:
    torch.manual_seed(0)
    np.random.seed(0)
    return Network(2, 10, 3, F.cross_entropy, backend="reference")


def batches(_: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    for size in (6, 4):
        images = torch.randn(size, 3, 8, 8, generator=generator)
        yield images, torch.randint(10, (size,), generator=generator), size


TRIALS = Trials(batches, SINGLE, lambda: None)


def test_the_papers_schedule_adds_seven_operations_by_epoch_14() -> None:
    config = preset("cifar10", "opp")
    there = [due_additions(config, epoch) for epoch in range(50)]
    assert there[:15] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
    assert set(there[14:]) == {8}


def test_the_cosine_restarts_at_the_current_rate_over_the_epochs_that_are_left() -> None:
    config = preset("cifar10", "opp")
    low, top, start = 0.001, 0.025, 0
    for epoch in range(50):
        value = low + (top - low) * (1 + math.cos(math.pi * (epoch - start) / (50 - start))) / 2
        if epoch in (2, 4, 6, 8, 10, 12, 14):
            top, start = value, epoch
        assert learning_rate(config, epoch) == pytest.approx(value, rel=1e-12)
    assert learning_rate(config, 49) < 0.0012


def test_inactive_operations_have_weight_zero_and_no_gradient() -> None:
    mixing = ActiveOps()
    mixing.set(["none", "sep_conv_5x5"])
    alphas = torch.randn(14, 8, requires_grad=True)
    weights = mixing("normal", alphas)
    active = torch.tensor([name in ("none", "sep_conv_5x5") for name in PRIMITIVES])
    torch.testing.assert_close(weights[:, active], alphas[:, active].softmax(1))
    assert (weights[:, ~active] == 0).all()
    (gradient,) = torch.autograd.grad((weights * torch.arange(8.0)).sum(), alphas)
    assert (gradient[:, ~active] == 0).all()
    assert torch.isfinite(gradient).all()
    assert mixing.state_dict() == {}


@pytest.mark.parametrize("op", ["sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3", "skip_connect"])
def test_a_renewed_operation_is_fresh_and_nothing_else_moves(network: Network, op: str) -> None:
    list(trial_losses(network, [op]))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(7.0)  # type: ignore[union-attr]
    column = PRIMITIVES.index(op)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    renew(network, op, seed=1, addition=2)
    once = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in network.state_dict().items():
        inside = f".m_ops.{column}." in name
        if "alphas" in name:
            others = [k for k in range(8) if k != column]
            assert torch.equal(value[:, others], before[name][:, others])
            assert 2e-4 < value[:, column].std() < 3e-3
        elif not inside:
            assert torch.equal(value, before[name]), name
        elif name.endswith("running_mean"):
            assert (value == 0).all(), name
        elif name.endswith("weight"):
            assert not torch.equal(value, before[name]), name
            bound = 1 / math.sqrt(value[0].numel())  # torch's initialisation of a convolution
            assert value.abs().max() <= bound
    assert torch.equal(torch.get_rng_state(), random[0])
    assert np.random.get_state()[1].tolist() == random[1]  # type: ignore[union-attr]
    renew(network, op, seed=1, addition=2)
    for name, value in network.state_dict().items():
        assert torch.equal(value, once[name]), name
    renew(network, op, seed=1, addition=3)
    assert not torch.equal(network.alphas_normal[:, column], once["alphas_normal"][:, column])


def trial_losses(network: Network, ops: list[str]) -> Iterator[float]:
    """Losses of trials with one active operation each."""
    mixing = ActiveOps()
    network.mixing = mixing
    step = SearchStep(network, SearchConfig(), CPU)
    for op in ops:
        mixing.set([op])
        yield trial_loss(step, TRIALS, 0)


def test_a_trial_uses_batch_statistics_and_changes_nothing(network: Network) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    losses = list(trial_losses(network, ["sep_conv_3x3", "sep_conv_3x3"]))
    assert losses[0] == losses[1]
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    total = 0.0
    with torch.no_grad():
        for images, labels, _ in batches():
            total += F.cross_entropy(network(images), labels).item() * len(labels)
    assert network.training
    assert losses[0] == pytest.approx(total / 10, rel=1e-6)


@pytest.mark.usefixtures("one_thread")
def test_the_first_operation_is_that_of_four_one_op_supernets(finished: Any, tools: Any) -> None:
    """The four losses once more, from supernets that have no other operation at all."""
    run = finished(stages=tools.OPP)
    first = tools.records(run, "operation")[0]
    config = tools.settings("--config", run / "config.json")
    dataset = tools.few_digits(config.image_size)
    trials = ResidentLoader(
        dataset.train, split_indices(len(dataset.train), 0.5)[0], batch_size=config.batch_size,
        augmentation=Augmentation(config.crop_padding, config.flip, config.cutout),
        mean=dataset.mean, std=dataset.std, seed=config.seed, stream="stage0-trials",
        shuffle=True, device=CPU,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    full = Network(2, 10, 3, F.cross_entropy, backend="reference")
    losses = {}
    for op in FIRST_OPS:
        renew(full, op, config.seed, 0)
        column = PRIMITIVES.index(op)
        table = np.zeros((14, 8), dtype=bool)
        table[:, column] = True
        single = Network(
            2, 10, 3, F.cross_entropy, switches_normal=table, switches_reduce=table,
            backend="reference",
        )  # fmt: skip
        state = {
            name.replace(f".m_ops.{column}.", ".m_ops.0."): value
            for name, value in full.state_dict().items()
            if ".m_ops." not in name or f".m_ops.{column}." in name
        }
        state |= {f"alphas_{kind}": torch.zeros(14, 1) for kind in ("normal", "reduce")}
        single.load_state_dict(state)
        single.mixing = lambda kind, alphas: torch.ones_like(alphas)
        single.train()
        total = count = 0.0
        with torch.no_grad():
            for images, labels in trials.epoch(0):
                total += F.cross_entropy(single(images), labels, reduction="sum").item()
                count += len(labels)
        losses[op] = total / count
    assert list(first["losses"]) == list(FIRST_OPS)
    assert first["losses"] == pytest.approx(losses, rel=1e-4)
    assert first["operation"] == max(losses, key=losses.__getitem__)


def test_the_order_is_that_of_the_losses_and_repeats_with_the_seed(
    finished: Any, search: Any, tools: Any, outcome: Any
) -> None:
    run = finished(stages=tools.OPP)
    additions = tools.records(run, "operation")
    order = [record["operation"] for record in additions]
    assert sorted(order) == sorted(PRIMITIVES)
    assert order[0] in FIRST_OPS
    assert order[-1] == "skip_connect"
    assert additions[-1]["losses"] == {}
    assert [record["epoch"] for record in additions] == list(range(8))
    for number, record in enumerate(additions[1:-1], start=1):
        assert list(record["losses"]) == [op for op in TRIED_OPS if op not in order[:number]]
    for record in additions[:-1]:
        losses = record["losses"]
        assert record["operation"] == max(losses, key=losses.__getitem__)
    assert outcome(search("again", stages=tools.OPP)) == outcome(run)


def test_the_result_is_that_of_darts_without_skip_cap(finished: Any, tools: Any) -> None:
    run = finished(stages=tools.OPP)
    assert [record["stage"] for record in tools.records(run, "stage")] == [1]
    (alphas,) = load_alphas(run)
    assert alphas["normal"].shape == (14, 8)
    genotype = load_genotype(run)
    assert genotype == derive([alphas]).genotype == check_genotype(genotype)
    for kind in ("normal", "reduce"):
        table = np.exp(alphas[kind]) / np.exp(alphas[kind]).sum(axis=1, keepdims=True)
        best = table[:, 1:].max(axis=1)
        for node in range(4):
            start = node * 2 + node * (node - 1) // 2
            kept = sorted(np.argsort(best[start : start + 2 + node])[-2:])
            pairs = getattr(genotype, kind)[2 * node : 2 * node + 2]
            assert [source for _, source in pairs] == kept
            for op, source in pairs:
                assert op == PRIMITIVES[1 + table[start + source, 1:].argmax()]
    lines = (run / "alphas.jsonl").read_text().splitlines()
    widths = [len(json.loads(line)["normal"][0]) for line in lines]
    assert widths == list(range(1, 9))


def test_an_addition_resets_the_optimisers_and_keeps_the_rest(tools: Any, one_thread: None) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    config = tools.settings("--preset", "demo", "--strategy", "opp", "--backend", "reference")
    strategy = Opp(config, CPU)
    network = Network(2, 10, 3, F.cross_entropy, backend="reference")
    strategy.start_stage(network, {}, resumed=False)
    step = SearchStep(network, config, CPU, strategy.alpha_term)
    list(strategy.begin_epoch(0, step, TRIALS))
    assert len(strategy.order) == 1
    for number, (images, labels, _) in enumerate(batches()):
        step.alpha_step(images, labels, number)
        step.weight_step(images, labels, number)
    assert not list(strategy.begin_epoch(0, step, TRIALS))
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    assert any(s["momentum_buffer"].abs().max() > 0 for s in step.weight_optimizer.state.values())
    list(strategy.begin_epoch(1, step, TRIALS))
    added = PRIMITIVES.index(strategy.order[1])
    for optimizer in (step.weight_optimizer, step.alpha_optimizer):
        for state in optimizer.state.values():
            assert all(not value.any() for value in state.values())
    for name, value in network.state_dict().items():
        # Operations that were tried and lost are fresh once more when they come.
        if ".m_ops." in name and f".m_ops.{PRIMITIVES.index(strategy.order[0])}." not in name:
            continue
        if "alphas" in name:
            first = PRIMITIVES.index(strategy.order[0])
            assert torch.equal(value[:, first], kept[name][:, first])
            assert not torch.equal(value[:, added], kept[name][:, added])
        else:
            assert torch.equal(value, kept[name]), name


def test_a_reset_optimiser_is_as_good_as_a_new_one() -> None:
    for make in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=3e-4),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.5, 0.999), weight_decay=1e-3),
    ):
        values = [torch.arange(4.0).requires_grad_() for _ in range(2)]
        used, new = make([values[0]]), make([values[1]])
        values[0].grad = torch.ones(4)
        used.step()
        with torch.no_grad():
            values[0].copy_(torch.arange(4.0))
        reset_optimizer(used)
        for number in range(3):
            for value, optimizer in zip(values, (used, new), strict=True):
                value.grad = torch.linspace(-1, 1, 4) * (number + 1)
                optimizer.step()
        assert torch.equal(*values)


@pytest.mark.parametrize("call", [4, 15], ids=["epoch2", "epoch8"])
def test_a_stopped_search_goes_on_exactly(
    call: int,
    search: Any,
    finished: Any,
    tools: Any,
    outcome: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process dies in the middle of an epoch, after so many weight steps."""
    whole = finished(stages=tools.OPP)
    steps = 0
    original = SearchStep.run

    def dying(self: SearchStep, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == call:
            raise KeyboardInterrupt
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SearchStep, "run", dying)
        with pytest.raises(KeyboardInterrupt):
            search("cut", stages=tools.OPP)
    cut = search("cut", "--resume", stages=tools.OPP)
    assert outcome(cut) == outcome(whole)


def test_a_trial_that_is_not_finite_is_an_error(network: Network) -> None:
    with torch.no_grad():
        network.classifier.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="loss that is not finite: try a smaller --lr"):
        list(trial_losses(network, ["sep_conv_3x3"]))
