"""Optimisers with a learning rate in a tensor: arithmetic of torch's own, and what they skip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.optimizers import SGD, Adam

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((3, 5), (1,), (33, 2, 3, 3), (17,))
KINDS = {
    "sgd": (
        lambda ps, **more: SGD(ps, 0.1, momentum=0.9, weight_decay=3e-4, **more),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=3e-4),
    ),
    "sgd-without-momentum": (
        lambda ps, **more: SGD(ps, 0.1, momentum=0.0, weight_decay=0.0, **more),
        lambda ps: torch.optim.SGD(ps, 0.1),
    ),
    "adam": (
        lambda ps, **more: Adam(ps, 0.1, betas=(0.5, 0.999), weight_decay=1e-3, **more),
        lambda ps: torch.optim.Adam(ps, 0.1, betas=(0.5, 0.999), weight_decay=1e-3),
    ),
}
both = pytest.mark.parametrize(("own", "stock"), KINDS.values(), ids=KINDS)
Make = Callable[..., Any]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(ps: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value.clone() for value in values if isinstance(value, Tensor)]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_updates_are_those_of_torch_bit_for_bit(own: Make, stock: Make, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    one, other = own(ours), stock(theirs)
    for step, lr in enumerate([0.1, 0.025, 1e-3]):
        gradients(ours, step)
        gradients(theirs, step)
        one.set_rate(lr)
        other.param_groups[0]["lr"] = lr
        one.update()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@both
def test_fused_kernels_compute_the_same(own: Make, stock: Make) -> None:
    ours, theirs = parameters(), parameters()
    one, other = own(ours, fused=True), own(theirs)
    for step, lr in enumerate([0.1, 0.025, 1e-3]):
        for ps, optimizer in ((ours, one), (theirs, other)):
            gradients(ps, step)
            optimizer.set_rate(lr)
            optimizer.update()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_flagged_overflow_changes_nothing(own: Make, stock: Make, fused: bool) -> None:
    ps = parameters()
    optimizer = own(ps, fused=fused)
    flag = torch.zeros(())
    gradients(ps, 0)
    optimizer.update(flag)
    before = [p.detach().clone() for p in ps] + tensors(optimizer)
    gradients(ps, 1)
    ps[0].grad[0] = float("inf")
    optimizer.update(flag.fill_(1))
    after = [p.detach() for p in ps] + tensors(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    gradients(ps, 1)
    optimizer.update(flag.fill_(0))
    assert not torch.equal(ps[0], before[0])


@both
def test_state_is_that_of_torch_and_loads_both_ways(own: Make, stock: Make) -> None:
    ours, theirs = parameters(), parameters()
    one, other = own(ours), stock(theirs)
    for ps, step in ((ours, one.update), (theirs, other.step)):
        gradients(ps, 0)
        step()
    saved = copy.deepcopy(one.state_dict())
    assert saved["param_groups"] == other.state_dict()["param_groups"]
    rate = one.lr
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    other.load_state_dict(saved)
    assert one.lr is rate is one.param_groups[0]["lr"]
    for ps, step in ((ours, one.update), (theirs, other.step)):
        gradients(ps, 1)
        step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@both
def test_state_made_beforehand_stays_in_place(own: Make, stock: Make) -> None:
    ps, other = parameters(), parameters()
    early, late = own(ps), own(other)
    early.prepare()
    places = [tensor.data_ptr() for tensor in early.tensors()]
    for step in range(2):
        for parameters_, optimizer in ((ps, early), (other, late)):
            gradients(parameters_, step)
            optimizer.update()
    assert [tensor.data_ptr() for tensor in early.tensors()] == places
    assert all(torch.equal(a, b) for a, b in zip(ps, other, strict=True))


@both
def test_parameters_without_a_gradient_stay(own: Make, stock: Make) -> None:
    ps = parameters()
    optimizer = own(ps)
    gradients(ps, 0)
    ps[1].grad = None
    before = ps[1].detach().clone()
    optimizer.update()
    assert torch.equal(ps[1], before)
    assert ps[1] not in optimizer.state
