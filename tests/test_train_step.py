"""One training step against the same arithmetic written out."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.train_config import TrainConfig, preset
from pdarts_fast.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def build(**changes: Any) -> TrainStep:
    config = dataclasses.replace(preset("cifar10"), **changes)
    torch.manual_seed(0)
    return TrainStep(NetworkCIFAR(2, 3, 3, True, PDARTS).train(), config, CPU)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 1])


def smoothed(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    logs = functional.log_softmax(logits, 1)
    return ((1 - share) * -logs.gather(1, labels[:, None])[:, 0] - share * logs.mean(1)).mean()


@pytest.mark.parametrize("share", [0.0, 0.1], ids=["plain", "label smoothing"])
def test_a_step_is_sgd_on_both_heads_with_clipped_gradients(share: float) -> None:
    step = build(label_smoothing=share, grad_clip=0.5, lr=0.1)
    network = copy.deepcopy(step.network)
    images, labels = batch()
    logits, logits_aux = network(images)
    assert logits_aux is not None
    loss = smoothed(logits, labels, share) + 0.4 * smoothed(logits_aux, labels, share)
    loss.backward()
    gradients = [p.grad for p in network.parameters()]
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert norm > 0.5
    step.set_epoch(lr=0.1, drop_path=0.0)
    step.run(images, labels, 0)
    for got, old, gradient in zip(step.parameters, network.parameters(), gradients, strict=True):
        assert gradient is not None
        want = old - 0.1 * (gradient * 0.5 / norm + 3e-4 * old)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    average = step.epoch_meter.read()[0]
    assert average.images == 4
    assert average.loss == pytest.approx(loss.item(), rel=1e-6)
    assert average.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_an_epoch_sets_learning_rate_and_drop_path() -> None:
    step = build()
    step.set_epoch(lr=0.01, drop_path=0.2)
    assert step.optimizer.param_groups[0]["lr"] == 0.01
    assert step.network.drop_path_prob == 0.2


def test_channels_last_gives_the_same_step() -> None:
    plain, last = build(), build(channels_last=True)
    for step in (plain, last):
        step.run(*batch(), 0)
    for one, other in zip(plain.parameters, last.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_trains_float32_weights() -> None:
    step = build(amp=True)
    before = [p.clone() for p in step.parameters]
    step.run(*batch(), 0)
    assert all(p.dtype == torch.float32 for p in step.parameters)
    assert any(not torch.equal(p, q) for p, q in zip(step.parameters, before, strict=True))
    assert int(step.first_bad_step) == -1


def test_the_first_loss_that_is_no_number_is_noted() -> None:
    step = build()
    images, labels = batch()
    step.run(images, labels, 4)
    assert int(step.first_bad_step) == -1
    step.run(images * float("nan"), labels, 5)
    step.run(images, labels, 6)
    assert int(step.first_bad_step) == 5


def test_a_restored_step_goes_on_bit_for_bit() -> None:
    one = build()
    one.run(*batch(), 0)
    other = build()
    nn.init.zeros_(other.network.classifier.weight)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (one, other):
        step.run(*batch(), 1)
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.epoch_meter.sums, other.epoch_meter.sums)


def test_configuration_reaches_the_optimiser() -> None:
    config: TrainConfig = preset("imagenet")
    step = build(momentum=config.momentum, weight_decay=config.weight_decay)
    group = step.optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 3e-5, False)
