"""Cost tables against the check values, against counted networks and against differences."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.cost import SCALES, Scale, genotype_cost, trace
from pdarts_fast.genotype import NAMED, PRIMITIVES, Genotype
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.search_space import CELL_TYPES, all_switches, drop_ops, edges, probabilities
from pdarts_fast.strategies.costs import CostTable, ExpectedCosts, cost_tables, edge_shares
from pdarts_fast.strategies.targets import Target

CPU = torch.device("cpu")
ODD = Scale(NetworkCIFAR, C=6, layers=7, num_classes=3, image_size=21)


@cache
def table(resource: str, scale: Scale = SCALES["cifar10"]) -> CostTable:
    return cost_tables([Target(resource, 1.0)], scale, CPU)[0]


def random_genotype(seed: int) -> Genotype:
    rng = np.random.default_rng(seed)
    cells = [
        [
            (PRIMITIVES[rng.integers(1, 8)], int(source))
            for node in range(4)
            for source in sorted(rng.choice(2 + node, 2, replace=False))
        ]
        for _ in range(2)
    ]
    return Genotype(cells[0], [2, 3, 4, 5], cells[1], [2, 3, 4, 5])


# Parameters of every operation over the 18 normal and the 2 reduction cells of the paper's
# CIFAR-10 network; the skip of a reduction cell has them at stride 2 only.
CHECK = {
    "max_pool_3x3": (0, 0),
    "avg_pool_3x3": (0, 0),
    "skip_connect": (0, 26_352),
    "sep_conv_3x3": (359_856, 56_592),
    "sep_conv_5x5": (408_240, 63_504),
    "dil_conv_3x3": (179_928, 28_296),
    "dil_conv_5x5": (204_120, 31_752),
}


def test_check_values_of_the_parameters_on_cifar10() -> None:
    params = table("params")
    assert params.fixed == 1_370_134
    for name, (normal, reduction) in CHECK.items():
        op = PRIMITIVES.index(name)
        assert set(params.ops["normal"][:, op]) == {normal}, name
        for edge, (_, source) in enumerate(edges()):
            wanted = 0 if name == "skip_connect" and source >= 2 else reduction
            assert params.ops["reduce"][edge, op] == wanted, (name, edge)
    assert params.of(NAMED["PDARTS"]) == 3_433_798
    assert params.of(NAMED["DARTS_V2"]) == 3_349_342
    uniform = {kind: np.full((14, 8), 1 / 8) for kind in CELL_TYPES}
    assert round(params.expected(uniform) / 1e6, 3) == 2.912


@pytest.mark.parametrize("scale", [SCALES["cifar10"], ODD], ids=["cifar10", "odd-sizes"])
@pytest.mark.parametrize(
    "genotype",
    [NAMED["PDARTS"], random_genotype(0)],
    ids=["PDARTS", "random"],
)
def test_tables_add_up_to_the_counted_network(genotype: Genotype, scale: Scale) -> None:
    cost = genotype_cost(genotype, scale)
    assert table("params", scale).of(genotype) == cost.parameters
    assert table("macs", scale).of(genotype) == cost.multiply_adds
    side = scale.image_size
    image = torch.empty(1, 3, side, side, device="meta")
    assert table("memory", scale).of(genotype) == 4 * trace(scale.build(genotype, "meta"), image)[1]


def test_a_table_survives_json() -> None:
    before = table("macs", ODD)
    after = CostTable.from_json(before.to_json())
    assert (after.resource, after.fixed) == (before.resource, before.fixed)
    for kind in CELL_TYPES:
        np.testing.assert_array_equal(after.ops[kind], before.ops[kind])


@pytest.mark.usefixtures("one_thread")
def test_latency_is_measured_and_skips_are_free() -> None:
    latency = table("latency", ODD)
    skip, sep = PRIMITIVES.index("skip_connect"), PRIMITIVES.index("sep_conv_5x5")
    assert latency.fixed > 0
    assert (latency.ops["normal"][:, skip] == 0).all()
    assert (latency.ops["normal"][:, sep] > 0).all()
    assert (latency.ops["reduce"][:, 1:3] > 0).all()


@pytest.fixture(params=[8, 5], ids=["stage1", "stage2"])
def stage(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Switches and alphas of a stage; ``none`` is dropped on some edges of the second."""
    rng = np.random.default_rng(5)
    switches = all_switches()
    alphas = {kind: rng.normal(size=(14, 8)).astype(np.float32) for kind in CELL_TYPES}
    if request.param == 5:
        switches = drop_ops(switches, alphas, 3)
        alphas = {kind: rng.normal(size=(14, 5)).astype(np.float32) for kind in CELL_TYPES}
        assert 0 < switches["normal"][:, 0].sum() < 14
    return switches, alphas


def test_expected_cost_of_alphas_in_torch_is_that_of_their_probabilities(stage: Any) -> None:
    switches, alphas = stage
    targets = [Target("params", 3e6), Target("macs", 4e8)]
    tables = cost_tables(targets, SCALES["cifar10"], CPU)
    term = ExpectedCosts(tables, targets, switches)
    found = term.expected([torch.from_numpy(alphas[kind]) for kind in CELL_TYPES])
    for one, target, value in zip(tables, targets, found.tolist(), strict=True):
        # By hand: renormalised probabilities, edge by edge.
        total = one.fixed
        for kind in CELL_TYPES:
            rows = probabilities(alphas[kind]).astype(np.float64)
            for edge, (node, _) in enumerate(edges()):
                names = np.flatnonzero(switches[kind][edge])
                pairs = [(op, p) for op, p in zip(names, rows[edge], strict=True) if op != 0]
                mean = sum(p * one.ops[kind][edge, op] for op, p in pairs)
                total += 2 / (2 + node) * mean / sum(p for _, p in pairs)
        assert value == pytest.approx(total / target.limit, rel=2e-6)


def test_the_term_of_the_alpha_loss_has_the_right_gradient(stage: Any) -> None:
    switches, alphas = stage
    targets = [Target("params", 3e6)]
    term = ExpectedCosts(cost_tables(targets, SCALES["cifar10"], CPU), targets, switches).double()
    term.coefficients.fill_(0.7)
    inputs = [torch.from_numpy(alphas[kind]).double().requires_grad_() for kind in CELL_TYPES]
    assert torch.autograd.gradcheck(lambda *a: term(a), inputs)
    term.coefficients.zero_()
    assert term(inputs).item() == 0


def test_two_of_a_nodes_edges_are_kept() -> None:
    assert edge_shares().sum() == pytest.approx(8)
