"""The very step that is captured on CUDA, traced and replayed: it equals eager steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.capture.trace import TraceCapture
from pdarts_fast.descent import Descent
from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.precision import LossScale, Precision
from pdarts_fast.step import SearchStep
from pdarts_fast.train_config import TrainConfig
from pdarts_fast.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread", "quick_traces")
CPU = torch.device("cpu")
STEPS = 6
Make = Callable[..., Any]


def run(step: SearchStep, make_batch: Make, alphas: bool) -> None:
    """Steps with another batch, learning rate, skip dropout, seed of the masks and number each."""
    for number in range(STEPS):
        step.set_epoch(0.1 / (number + 1), 0.5 - 0.08 * number)
        step.network.dropout_state[0] = 1000 + 7 * number
        alpha_batch = make_batch(100 + number) if alphas else None
        step.run(make_batch(number), alpha_batch, 40 + number)


def require_same(got: Descent, want: Descent) -> None:
    """Parameters, statistics, counters, optimisers and sums are equal bit for bit."""
    got.prepare()
    want.prepare()
    assert len(got.state_tensors()) == len(want.state_tensors())
    names = [name for name, _ in (*got.module.named_parameters(), *got.module.named_buffers())]
    names += [f"state {number}" for number in range(len(got.state_tensors()) - len(names))]
    for name, one, other in zip(names, got.state_tensors(), want.state_tensors(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda stage: f"stage{stage}")
@pytest.mark.parametrize("alphas", [False, True], ids=["weights", "alphas-and-weights"])
def test_replayed_steps_equal_eager_ones(
    alphas: bool, stage: int, amp: bool, backend: str, make_step: Make, make_batch: Make
) -> None:
    eager, traced = (make_step(stage, backend, amp=amp) for _ in range(2))
    capture = TraceCapture()
    traced.capture_with(capture)
    before = [value.clone() for value in eager.state_tensors()]
    run(eager, make_batch, alphas)
    run(traced, make_batch, alphas)
    assert not capture.broken
    assert len(capture.traces) == 1
    require_same(traced, eager)
    changed = [not torch.equal(a, b) for a, b in zip(before, eager.state_tensors(), strict=False)]
    assert sum(changed) > len(changed) / 2
    cells = [n for n in capture.traces[0].graph.nodes if "cell_forward" in str(n.target)]
    passes = 1 + alphas
    assert len(cells) == (3 * passes if backend == "cpu" else 0)


@pytest.mark.usefixtures("fused_optimizers")
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "loss-scale"])
def test_the_fused_optimisers_of_cuda_replay_too(
    scaled: bool, make_step: Make, make_batch: Make
) -> None:
    precision = Precision(torch.float16 if scaled else None, scaled)
    eager, traced = (make_step(precision=precision) for _ in range(2))
    capture = TraceCapture()
    traced.capture_with(capture)
    for step in (eager, traced):
        run(step, make_batch, True)
    require_same(traced, eager)
    targets = {str(node.target) for node in capture.traces[0].graph.nodes}
    assert {"aten._fused_sgd_.tensor_lr", "aten._fused_adam_.tensor_lr"} <= targets
    assert not any("pdarts_fast" in target for target in targets)


def test_a_replay_that_overflows_skips_its_updates_and_lowers_the_scale(
    make_step: Make, make_batch: Make
) -> None:
    precision = Precision(None, True)
    eager, traced = (make_step(precision=precision) for _ in range(2))
    traced.capture_with(TraceCapture())
    # The artificial overflow: what ranks would do to gradients makes them infinite, or not.
    factor = torch.ones(())

    def overflow(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    for step in (eager, traced):
        step.average_gradients = overflow
        factor.fill_(1.0)
        run(step, make_batch, False)
        before = [p.detach().clone() for p in step.weights]
        factor.fill_(float("inf"))
        step.run(make_batch(50), None, 50)
        assert all(torch.equal(p, q) for p, q in zip(step.weights, before, strict=True))
        assert step.scale.scale.item() == LossScale.INITIAL / 2
        factor.fill_(1.0)
        step.run(make_batch(51), None, 51)
        assert not torch.equal(step.weights[0], before[0])
        assert step.scale.scale.item() == LossScale.INITIAL / 2
        assert step.first_bad_step.item() == -1
    require_same(traced, eager)


def derived(amp: bool, auxiliary: bool) -> TrainStep:
    config = TrainConfig(amp=amp, drop_path=0.3, auxiliary=auxiliary, label_smoothing=0.1)
    torch.manual_seed(0)
    network = NetworkCIFAR(2, 3, 3, auxiliary, PDARTS).train()
    return TrainStep(network, config, CPU, tensor_drop_path=True)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_a_derived_network_replays_with_its_drop_path(amp: bool, make_batch: Make) -> None:
    # The auxiliary head wants images of 32×32.
    eager, traced = derived(amp, not amp), derived(amp, not amp)
    side = 8 if amp else 32
    capture = TraceCapture()
    traced.capture_with(capture)
    for step in (eager, traced):
        torch.manual_seed(5)
        for number in range(STEPS):
            step.set_epoch(0.1 / (number + 1), 0.1 * number)
            step.run(*make_batch(number, 3, side), number)
    assert len(capture.traces) == 1
    require_same(traced, eager)
    assert any("rand" in str(node.target) for node in capture.traces[0].graph.nodes)


def test_a_frozen_rate_would_be_noticed(
    make_step: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, traced = make_step(), make_step()
    traced.capture_with(TraceCapture())
    run(eager, make_batch, False)
    update = type(traced.weight_optimizer).update

    def frozen(self: Any, found_inf: Tensor | None = None) -> None:
        self.lr = self.lr.clone()
        update(self, found_inf)

    monkeypatch.setattr(type(traced.weight_optimizer), "update", frozen)
    run(traced, make_batch, False)
    with pytest.raises(AssertionError):
        require_same(traced, eager)


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x * (1 if x.sum() > 0 else 2), "_local_scalar_dense"),
        (lambda x: x[x > 0], "nonzero|index"),
        (lambda x: x + torch.tensor([1.0]), "lift_fresh"),
    ],
    ids=["item", "condition", "shape", "constant"],
)
def test_what_a_cuda_graph_cannot_hold_is_refused(
    read: Callable[[Tensor], Tensor], named: str
) -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match=named):
        TraceCapture().record(lambda: x.copy_(read(x)[:1]))
