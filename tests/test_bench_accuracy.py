"""Errors of a stage against float64, with and without ReLUs and pools that take another side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pdarts_fast.bench import accuracy, decisions, rivals
from pdarts_fast.kernels import backends, cell_operator, reference


@pytest.mark.skipif(not backends.available()["cpu"].usable, reason="needs the compiled kernels")
@pytest.mark.parametrize("stage", [1, 3])
def test_rounding_of_the_fused_cells_is_that_of_torch(stage: int) -> None:
    """1e-5, or what torch has where that is more: two images through 17 cells."""
    found = accuracy.errors(stage, 2, "cpu")
    own, torchs = found["cpu"]["rounding"], found[rivals.PUBLISHED]["rounding"]
    assert own.keys() == torchs.keys()
    for name, error in own.items():
        assert 0 < error <= max(1e-5, 1.5 * torchs[name]), name
    # Flips are counted and change gradients, not the output.
    for rival in found.values():
        assert rival["plain"]["logits"] < 1e-4
        if rival["flips"] == 0:
            assert rival["plain"] == rival["rounding"]
        elif rival["flips"] > 3:
            assert rival["plain"]["weight gradients"] > 3 * rival["rounding"]["weight gradients"]


class ExactPrimitives(reference.Reference):
    """Primitives in float64 whose results are rounded to the arrays' float32."""

    def coefficient_dtype(self, storage: torch.dtype) -> torch.dtype:
        return torch.float64


@pytest.mark.slow
@pytest.mark.skipif(not backends.available()["cpu"].usable, reason="needs the compiled kernels")
def test_storing_float32_alone_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """In stage 3 cells that compute in float64 and keep float32 do not have 1e-5 either."""
    backends.load("cpu").register()
    in_storage = reference._weights
    monkeypatch.setattr(reference, "_wide", Tensor.double)
    monkeypatch.setattr(
        reference, "_weights", lambda *args: tuple(w.double() for w in in_storage(*args))
    )
    monkeypatch.setitem(cell_operator._BACKENDS, "cpu", ExactPrimitives())
    with cell_operator.primitive_by_primitive("cpu"):
        found = accuracy.errors(3, 8, "cpu")
    own, torchs = found["cpu"]["rounding"], found[rivals.PUBLISHED]["rounding"]
    assert 1e-5 < own["weight gradients"] < torchs["weight gradients"]
    # It does compute more exactly than torch.
    assert own["logits"] < torchs["logits"]


def test_a_graph_with_its_own_decisions_is_the_same_graph() -> None:
    made = rivals.make(1, 2, backends.REFERENCE)[rivals.PUBLISHED]
    network = made.network.double()
    twin = copy.deepcopy(network)
    with decisions.of_published(network) as sides:
        want = accuracy.values(network, made.images.double(), made.labels)
    # 516 is the number of ReLUs and maximum pools of five cells with 14 edges of 8 operations.
    assert len(sides) == 516
    got = accuracy.values(decisions.imposed(twin, sides), made.images.double(), made.labels)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)

    name = next(name for name, side in sides.items() if side.dtype == torch.bool)
    other = {**sides, name: ~sides[name]}
    assert decisions.differing(sides, other) == sides[name].numel()
    flipped = accuracy.values(decisions.imposed(twin, other), made.images.double(), made.labels)
    assert (flipped["logits"] - want["logits"]).abs().max() > 1e-6
    with pytest.raises(ValueError, match="decisions and modules differ"):
        decisions.imposed(twin, {name: sides[name]})
