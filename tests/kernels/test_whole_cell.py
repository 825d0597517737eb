"""A whole pass in one call is the primitives one by one, and these are what gets measured."""

from __future__ import annotations

import pytest
import torch

from pdarts_fast.bench import primitives, rivals
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.cpu import load as cpu_load

pytestmark = pytest.mark.skipif(
    not cpu_load.availability().usable, reason=cpu_load.availability().reason
)


def gradients(stage: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and all gradients of a small network of a stage."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    rival = rivals.Rival(rivals.network(stage, "cpu"), images, torch.arange(4))
    loss = rival.loss()
    loss.backward()
    return float(loss.detach()), [p.grad for p in rival.network.parameters() if p.grad is not None]


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
