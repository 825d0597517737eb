"""A whole pass in one call is the primitives one by one, and these are what gets measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdarts_fast.bench import measure, primitives, rivals
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels import cell_operator, plan
from pdarts_fast.kernels.cpu import load as cpu_load
from pdarts_fast.kernels.running import move_statistics

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


@pytest.mark.skipif(not cpu_load.availability().usable, reason=cpu_load.availability().reason)
@pytest.mark.parametrize("stage", [1, 3], ids=["eight-ops", "three-ops"])
def test_whole_passes_keep_neither_pools_nor_copies_of_weights(stage: int) -> None:
    network = rivals.network(stage, "cpu")
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    rival = rivals.Rival(network, images, torch.arange(2))
    whole = measure.saved_bytes(network, rival.loss)
    with fused.primitive_by_primitive("cpu"):
        single = measure.saved_bytes(network, rival.loss)
    pools = copies = 0
    for cell in network.cells:
        found = plan.from_key(fused.prepare(cell).key)
        slots = {b.slot for b in found.branches if b.kind in (plan.MAX_POOL, plan.AVG_POOL)}
        # 16 channels at 16 x 16 pixels, twice as many at half the sides.
        pools += len(slots) * 4 * 2 * 16 * 16 * 16 * 16 // found.channels
        copies += sum(parameter.nbytes for parameter in cell.parameters())
    assert min(pools, copies) > 0
    # Cell by cell, each keeps rate (float32) and state (2 int64) of the dropout.
    dropouts = (len(network.cells) - 1) * (4 + 2 * 8)
    assert single - whole == pools + copies + dropouts


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


@pytest.mark.parametrize("channels", [16, 12], ids="{}-channels".format)
def test_running_statistics_move_as_by_torch(kernels: str, channels: int) -> None:
    table = [[True] * 8] * 5
    cell = plan.from_key(
        plan.make_key(
            table, channels=channels, in_channels=(8, 8), reduction=False, reduction_prev=True,
            steps=2, multiplier=2, index=0, dropout=False,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    stats = torch.rand(cell.num_slots + 2, 2, 16, dtype=torch.float64, generator=generator)
    running = [torch.rand(channels, generator=generator) for _ in range(2 * len(cell.norms))]
    batches = [torch.tensor(number) for number in range(len(cell.norms))]
    others = [x.clone() for x in running], [x.clone() for x in batches]
    graph = running[0].clone().requires_grad_() * running[0]
    whole = cell_operator.any_cell(kernels, torch.float32)
    assert whole is not None
    assert whole.move_running(cell, running, batches, stats, [5, 1])
    move_statistics(cell, *others, stats, [5, 1])
    torch.testing.assert_close(running, others[0], rtol=2e-7, atol=0)
    assert batches == others[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.sum().backward()
    wide = [x.double() for x in running]
    assert not whole.move_running(cell, wide, batches, stats, [5, 1])
