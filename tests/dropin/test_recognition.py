"""Every kind of cell that is accelerated, against its own forward in float64 (the trial)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from pdarts_fast.dropin import probe
from pdarts_fast.dropin.recognise import NotRecognised, Recipe, find_cells, recognise

pytestmark = pytest.mark.usefixtures("one_thread")

PDARTS_NORMAL = [
    *[("skip", 0), ("dil_3", 1)],
    *[("skip", 0), ("sep_3", 1)],
    *[("sep_3", 1), ("sep_3", 3)],
    *[("sep_3", 0), ("dil_5", 4)],
]
POOLED = [
    *[("avg_pool", 0), ("sep_5", 1)],
    *[("sep_3", 0), ("max_pool", 0)],
    *[("max_pool", 0), ("skip", 1)],
]


def tried(cell: nn.Module) -> Recipe:
    """The recipe of a cell that agrees with its own forward; NotRecognised if it does not."""
    reason = NotRecognised("no candidates")
    for candidate in recognise(cell):
        try:
            return probe.try_out(cell, type(cell), candidate)
        except NotRecognised as error:
            reason = error
    raise reason


def some(edge: int) -> tuple[str, ...]:
    """Three operations in an order of their own."""
    rows = (
        ("sep_5", "skip", "none"),
        ("dil_3", "max_pool", "sep_3"),
        ("avg_pool", "none", "dil_5"),
    )
    return rows[edge % 3]


def ragged(edge: int) -> tuple[str, ...]:
    """One to four operations, some twice."""
    return (("sep_3",), ("skip", "max_pool", "max_pool", "none"), ("dil_5", "sep_3", "sep_3"))[
        edge % 3
    ]


def custom(edge: int) -> tuple[str, ...]:
    """Custom operations among the usual ones."""
    return (("gate", "sep_3", "skip"), ("none", "dil_3", "sep_7"), ("max_pool", "gate", "gate"))[
        edge % 3
    ]


SEARCH: dict[str, dict[str, Any]] = {
    "all-ops": {},
    "reduction": {"reduction": True},
    "after-reduction": {"reduction_prev": True},
    "reduction-after-reduction": {"reduction": True, "reduction_prev": True},
    "three-steps-two-out": {"steps": 3, "multiplier": 2},
    "other-order": {"names": some},
    "ragged": {"names": ragged, "reduction": True},
    "ragged-list": {"names": ragged, "strict": True},
    "custom": {"names": custom},
    "custom-reduction": {"names": custom, "reduction": True, "reduction_prev": True},
    "affine": {"affine": True},
    "affine-reduction": {"affine": True, "reduction": True, "reduction_prev": True},
    "affine-custom": {"affine": True, "names": custom},
    "skip-dropout": {"rate": 0.4},
    "skip-dropout-custom-ragged": {"rate": 0.4, "names": lambda edge: custom(edge) + ragged(edge)},
    "bare-pools": {"names": lambda edge: ("bare_max", "max_pool", "sep_3", "bare_avg")},
    "one-op": {"names": lambda edge: ("dil_3",)},
    "one-channel": {"C": 1, "names": lambda edge: ("sep_3", "skip", "max_pool")},
    "odd-channels": {"C": 5, "names": some, "reduction": True},
}


@pytest.mark.parametrize("arguments", SEARCH.values(), ids=SEARCH.keys())
def test_search_cell_agrees_with_its_own_forward(
    zoo: ModuleType, arguments: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    cell = zoo.SearchCell(**arguments)
    recipe = tried(cell)
    assert recipe.searches
    assert not recipe.plan.outside
    assert recipe.plan.concat == tuple(range(cell.steps))[-cell.multiplier :]
    assert recipe.weights_as_list == arguments.get("strict", False)


DERIVED: dict[str, tuple[Any, ...]] = {
    "pdarts": (PDARTS_NORMAL, range(2, 6), {}),
    "pools-reduction": (POOLED, [4, 2], {"reduction": True, "reduction_prev": True}),
    "custom": ([("gate", 0), ("sep_7", 1), ("sep_3", 2), ("skip", 0)], [2, 3], {}),
}


@pytest.mark.parametrize(("pairs", "concat", "arguments"), DERIVED.values(), ids=DERIVED.keys())
def test_derived_cell_agrees_with_its_own_forward(
    zoo: ModuleType, pairs: Any, concat: Any, arguments: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    recipe = tried(zoo.DerivedCell(pairs, concat, **arguments))
    assert not recipe.searches
    assert recipe.drop_path, "drop-path draws other masks"
    assert recipe.plan.concat == tuple(state - 2 for state in concat)


def test_odd_preprocessing_runs_outside(zoo: ModuleType) -> None:
    cell = zoo.SearchCell(some)
    cell.in0 = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.Tanh())
    assert tried(cell).plan.outside


REFUSED = {
    "half-the-sum": (lambda zoo: zoo.HalvedCell(some), "differs from that of the method"),
    "fourth-argument": (lambda zoo: zoo.WeightedCell(some), "does not take"),
    "partial-channels": (lambda zoo: partial(zoo), "more than one list of operations"),
    "no-convolution": (lambda zoo: zoo.SearchCell(lambda e: ("skip", "max_pool")), "none of its"),
    "own-parameter": (lambda zoo: with_parameter(zoo), "parameters or buffers of its own"),
    "edges-missing": (lambda zoo: with_edges(zoo, 12), "12 edges"),
    "foreign-parameter": (lambda zoo: with_foreign(zoo), "not its own"),
}


def partial(zoo: ModuleType) -> nn.Module:
    cell = zoo.SearchCell(some)
    cell.edges[3] = zoo.PartialMixed(list(cell.edges[3].choices))
    return cell


def with_parameter(zoo: ModuleType) -> nn.Module:
    cell = zoo.SearchCell(some)
    cell.gain = nn.Parameter(torch.ones(()))
    return cell


def with_edges(zoo: ModuleType, count: int) -> nn.Module:
    cell = zoo.SearchCell(some)
    cell.edges = cell.edges[:count]
    return cell


class Foreign(nn.Module):
    """Multiplies by a parameter that it hides from its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones((), dtype=torch.float64))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.hidden[0]


def with_foreign(zoo: ModuleType) -> nn.Module:
    cell = zoo.SearchCell(some)
    cell.edges[0].choices[0] = Foreign()
    return cell


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_something_else_is_refused(zoo: ModuleType, make: Any, reason: str) -> None:
    with pytest.raises(NotRecognised, match=reason):
        tried(make(zoo))


def test_random_generators_are_left_as_they_were(zoo: ModuleType) -> None:
    cell = zoo.SearchCell(custom, rate=0.3)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    tried(cell)
    assert torch.equal(torch.rand(3), wanted)


def test_only_cells_are_found(darts: ModuleType, zoo: ModuleType) -> None:
    network = darts.Network(2, 3, 3, nn.CrossEntropyLoss())
    assert [path for path, _ in find_cells(network)] == ["cells.0", "cells.1", "cells.2"]
    derived = nn.ModuleList([zoo.DerivedCell(PDARTS_NORMAL, range(2, 6))])
    assert [path for path, _ in find_cells(derived)] == ["0"]
    assert not list(find_cells(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.ReLU()]))))
