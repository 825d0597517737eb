"""A whole pass in one call is the primitives one by one, and these are what gets measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdarts_fast.bench import primitives, rivals
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.cpu import load as cpu_load

CASES = {
    "normal-dropout": {"channels": 16, "live": 4, "dropout": 0.4},
    "reduction-odd": {
        "reduction": True, "reduction_prev": True, "live": 3, "height": 7, "width": 5,
    },
    "after-reduction": {"reduction_prev": True, "live": 2, "channels": 12},
    "evaluation": {"training": False, "live": 3, "dropout": 0.4},
    "evaluation-reduction": {"training": False, "live": 3, "reduction": True},
    "empty-node": {"live": 1, "seed": 233},
}  # fmt: skip


def gradients(stage: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and all gradients of a small network of a stage."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    rival = rivals.Rival(rivals.network(stage, "cpu"), images, torch.arange(4))
    loss = rival.loss()
    loss.backward()
    return float(loss.detach()), [p.grad for p in rival.network.parameters() if p.grad is not None]


@pytest.mark.skipif(not cpu_load.availability().usable, reason=cpu_load.availability().reason)
@pytest.mark.parametrize("stage", [1, 3], ids=["eight-ops", "three-ops"])
def test_one_call_is_the_primitives_one_by_one(stage: int) -> None:
    whole_loss, whole = gradients(stage)
    with (
        fused.primitive_by_primitive("cpu"),
        primitives.recording(fused.backend_named("cpu")) as costs,
    ):
        loss, single = gradients(stage)
    assert set(costs) == set(primitives.NAMES)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert len(single) == len(whole)
    for left, right in zip(whole, single, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-7
    with primitives.recording(fused.backend_named("cpu")) as costs:
        gradients(stage)
    assert not costs


@pytest.mark.parametrize("step", ["weight", "alpha"])
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_every_value_is_that_of_the_primitives(
    make_case: Any, run: Any, close: Any, kernels: str, arguments: dict[str, Any], step: str
) -> None:
    case = make_case(**arguments)
    cell, inputs = case.cell().requires_grad_(step == "weight"), case.inputs()
    whole = run(cell, inputs, kernels, torch.float32)
    with fused.primitive_by_primitive(kernels):
        single = run(cell, inputs, kernels, torch.float32)
    assert "weights" in whole
    close(whole, single, 2e-5)


@pytest.mark.parametrize("wanted", [(), (1,)], ids=["alphas-alone", "one-input"])
def test_only_wanted_gradients_are_computed(make_case: Any, kernels: str, wanted: Any) -> None:
    case = make_case(live=3, seed=2)
    cell = case.cell().float().requires_grad_(False)
    *states, alphas = (x.float() for x in case.inputs())
    alphas.requires_grad_()
    for which in wanted:
        states[which].requires_grad_()
    sources = [alphas, *(states[which] for which in wanted)]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = fused.run(kernels, cell, *states, alphas)
        return torch.autograd.grad(out.square().sum(), sources)

    whole = gradients()
    with fused.primitive_by_primitive(kernels):
        single = gradients()
    for left, right in zip(whole, single, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm()


def test_running_statistics_are_moved_as_by_torch(make_case: Any, kernels: str) -> None:
    case = make_case(live=4, reduction_prev=True, channels=12)
    names = case.cell()
    key = case.key if hasattr(case, "key") else fused.names_of(names).key
    assert key
