"""One step of a search: what it changes, what it computes, and that it is the plain step."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdarts_fast.config import SearchConfig
from pdarts_fast.step import SearchStep
from pdarts_fast.supernet import Network

GOLDEN = Path(__file__).parent / "golden" / "supernet_stage1.safetensors"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(1)
    np.random.seed(1)
    return Network(1, 3, 3, F.cross_entropy, p=0.3, backend="reference")


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(3, (size,), generator=generator)


def make_step(network: Network, **settings: Any) -> SearchStep:
    step = SearchStep(network, SearchConfig(**settings), CPU)
    step.set_epoch(0.025, 0.3)
    return step


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


class Operations(TorchDispatchMode):
    """Counts operations, and the gradients that convolutions are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == "convolution_backward":
            for wanted, kind in zip(args[-1], ("input", "weight", "bias"), strict=True):
                self.counts[f"convolution {kind} gradient"] += wanted
        return func(*args, **(kwargs or {}))


def test_an_alpha_step_changes_only_alphas_and_computes_no_weight_gradient(
    network: Network,
) -> None:
    step = make_step(network)
    before = values(network)
    with Operations() as operations:
        step.alpha_step(*batch(0), 0)
    assert operations.counts["convolution input gradient"] > 100
    assert operations.counts["convolution weight gradient"] == 0
    for name, parameter in network.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == name.startswith("alphas"), name
        assert parameter.grad is None, name
    assert not step.weight_optimizer.state


def test_a_weight_step_changes_only_weights_and_computes_no_alpha_gradient(
    network: Network,
) -> None:
    step = make_step(network)
    before = values(network)
    with Operations() as operations:
        step.weight_step(*batch(0), 0)
    assert operations.counts["convolution weight gradient"] > 100
    assert operations.counts["_softmax_backward_data"] == 0
    for name, parameter in network.named_parameters():
        if name.startswith("alphas"):
            assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert not torch.equal(network.classifier.weight, before["classifier.weight"])
    assert not step.alpha_optimizer.state


def plain_step(
    network: Network, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]
) -> None:
    """The step as it is usually written: all gradients, of which one part is used."""
    network.zero_grad()
    network._loss(*data).backward()
    parameters = optimizer.param_groups[0]["params"]
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()


def test_steps_equal_plain_steps_that_compute_all_gradients(network: Network) -> None:
    plain = copy.deepcopy(network)
    step = make_step(network)
    plain.p = 0.3
    plain.update_p()
    weights = torch.optim.SGD(plain.weight_parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    alphas = torch.optim.Adam(plain.arch_parameters(), 6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    for number in range(2):
        step.alpha_step(*batch(2 * number), number)
        step.weight_step(*batch(2 * number + 1), number)
        plain_step(plain, alphas, batch(2 * number))
        plain_step(plain, weights, batch(2 * number + 1))
    for (name, got), want in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, want), name
    for (name, got), want in zip(network.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want), name


def test_bilevel_trajectory_of_the_published_program() -> None:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(GOLDEN)
    network = Network(
        config["C"], config["num_classes"], config["layers"], F.cross_entropy, backend="reference"
    ).double()
    initial = {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")}
    network.load_state_dict(initial)
    step = SearchStep(network, SearchConfig(), CPU)
    step.set_epoch(0.025, 0.0)
    losses = []
    for number, data in enumerate(zip(tensors["x"], tensors["y"], strict=True)):
        (step.weight_step if number % 2 else step.alpha_step)(*data, number)
        losses.append(step.interval_meter.read()[0 if number % 2 else 1].loss)
        step.interval_meter.reset()
    want = {k.removeprefix("trajectory."): v for k, v in tensors.items() if "trajectory." in k}
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64), want.pop("losses"), rtol=1e-9, atol=0
    )
    for name, tensor in want.items():
        got = network.get_parameter(name).detach()
        limit = 1e-9 * tensor.abs().max().item() + 1e-14
        assert (got - tensor).abs().max().item() <= limit, name


def test_meters_sum_weights_and_alphas_apart(network: Network) -> None:
    step = make_step(network)
    frozen = copy.deepcopy(network)
    images, labels = batch(0, 6)
    step.alpha_step(images, labels, 0)
    logits = frozen(images)
    weights, alphas = step.epoch_meter.read()
    assert weights == (None, None, 0)
    assert alphas.images == 6
    assert alphas.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert alphas.accuracy == (logits.argmax(1) == labels).double().mean().item()
    step.interval_meter.reset()
    step.weight_step(*batch(1, 2), 0)
    assert [part.images for part in step.epoch_meter.read()] == [2, 6]
    assert [part.images for part in step.interval_meter.read()] == [2, 0]


def test_a_mean_over_batches_counts_images_not_batches(network: Network) -> None:
    step = make_step(network)
    losses = []
    for size in (4, 2):
        step.weight_step(*batch(size, size), 0)
        losses.append(step.interval_meter.read()[0].loss)
        step.interval_meter.reset()
    mean = (4 * losses[0] + 2 * losses[1]) / 6
    assert step.epoch_meter.read()[0].loss == pytest.approx(mean, rel=1e-12)


def test_the_first_loss_that_is_not_finite_is_remembered(network: Network) -> None:
    step = make_step(network)
    step.weight_step(*batch(0), 0)
    assert int(step.first_bad_step) == -1
    images, labels = batch(1)
    step.weight_step(images * float("nan"), labels, 7)
    step.weight_step(*batch(2), 8)
    assert int(step.first_bad_step) == 7


def test_a_gradient_that_is_not_finite_counts_although_the_loss_is(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(network)
    network.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    step.weight_step(*batch(0), 3)
    assert step.epoch_meter.read()[0].loss is not None
    assert int(step.first_bad_step) == 3


def test_gradients_are_clipped_over_all_parameters_of_a_step(network: Network) -> None:
    step = make_step(network, grad_clip=1e-3, momentum=0.0, weight_decay=0.0)
    before = values(network)
    step.weight_step(*batch(0), 0)
    moved = sum(
        (p.detach() - before[n]).double().pow(2).sum() for n, p in network.named_parameters()
    )
    assert float(moved) ** 0.5 == pytest.approx(0.025 * 1e-3, rel=1e-2)


def test_state_goes_on_in_another_step_bit_for_bit(network: Network) -> None:
    step = make_step(network)
    step.alpha_step(*batch(0), 0)
    step.weight_step(*batch(1), 0)
    saved = copy.deepcopy(step.state_dict())
    torch.manual_seed(99)
    other = make_step(Network(1, 3, 3, F.cross_entropy, p=0.3, backend="reference"))
    other.load_state_dict(saved)
    other.set_epoch(0.025, 0.3)
    for one in (step, other):
        one.alpha_step(*batch(2), 1)
        one.weight_step(*batch(3), 1)
    for (name, got), want in zip(
        other.network.named_parameters(), network.parameters(), strict=True
    ):
        assert torch.equal(got, want), name
    assert torch.equal(other.epoch_meter.sums, step.epoch_meter.sums)
    assert torch.equal(other.network.dropout_state, network.dropout_state)


def test_mixed_precision_keeps_weights_and_loss_in_float32(network: Network) -> None:
    step = make_step(network, amp=True)
    loss, logits = step.forward(*batch(0))
    assert loss.dtype == logits.dtype == torch.float32
    before = values(network)
    step.alpha_step(*batch(0), 0)
    step.weight_step(*batch(1), 0)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert not torch.equal(network.alphas_normal, before["alphas_normal"])
