"""Repairs: they meet the targets, keep to the skip cap and lose little."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.cost import SCALES
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import NAMED, PRIMITIVES, Genotype, count_skips
from pdarts_fast.search_space import CELL_TYPES, all_switches, derive, drop_ops, edge_index
from pdarts_fast.strategies.costs import CostTable, cost_tables
from pdarts_fast.strategies.repair import Repair, log_probabilities, require_feasible
from pdarts_fast.strategies.targets import Target

CPU = torch.device("cpu")
PARAMS, MACS, MEMORY = cost_tables(
    [Target(name, 1.0) for name in ("params", "macs", "memory")], SCALES["cifar10"], CPU
)


def stages(seed: int) -> list[dict[str, Any]]:
    """Alphas of three stages."""
    rng = np.random.default_rng(seed)
    return [{kind: rng.normal(size=(14, k)) for kind in CELL_TYPES} for k in (8, 5, 3)]


def test_log_probabilities_of_an_edge_add_up_to_one_over_all_stages() -> None:
    alphas = stages(0)
    logs = log_probabilities(alphas)
    first = drop_ops(all_switches(), alphas[0], 3)
    second = drop_ops(first, alphas[1], 2)
    for kind in CELL_TYPES:
        np.testing.assert_allclose(np.exp(logs[kind]).sum(axis=1), 1, rtol=1e-12)
        for edge in range(14):
            p = [np.exp(stage[kind][edge]) / np.exp(stage[kind][edge]).sum() for stage in alphas]
            alive = [np.arange(8), np.flatnonzero(first[kind][edge])]
            alive.append(np.flatnonzero(second[kind][edge]))
            share = 1.0
            for number, ops in enumerate(alive):
                kept = alive[number + 1] if number < 2 else []
                for op, probability in zip(ops, p[number], strict=True):
                    if op not in kept:
                        wanted = share * probability
                        assert np.exp(logs[kind][edge, op]) == pytest.approx(wanted, rel=1e-6)
                share *= sum(q for op, q in zip(ops, p[number], strict=True) if op in kept)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "limits",
    [(2.2e6, None, None), (1.5e6, None, None), (None, 3e8, None), (2.5e6, 4e8, 6e7)],
    ids=["params", "params-tight", "macs", "three"],
)
def test_the_repaired_cell_meets_every_target_and_the_skip_cap(
    seed: int, limits: tuple[float | None, ...]
) -> None:
    pairs = [(t, limit) for t, limit in zip((PARAMS, MACS, MEMORY), limits, strict=True) if limit]
    tables = [one for one, _ in pairs]
    targets = [Target(one.resource, limit) for one, limit in pairs]
    alphas = stages(seed)
    genotype = derive(alphas).restricted[2]
    require_feasible(tables, targets, 2)
    fixed, swaps = Repair(genotype, tables, targets, 2).run(log_probabilities(alphas))
    for one, target in zip(tables, targets, strict=True):
        assert one.of(fixed) <= target.limit
    assert count_skips(fixed.normal) <= 2
    assert "none" not in {op for op, _ in (*fixed.normal, *fixed.reduce)}
    changed = sum(
        old != new
        for kind in CELL_TYPES
        for old, new in zip(getattr(genotype, kind), getattr(fixed, kind), strict=True)
    )
    assert len(swaps) == changed
    for kind in CELL_TYPES:
        sources = [[source for _, source in getattr(g, kind)] for g in (genotype, fixed)]
        assert sources[0] == sources[1]


def test_a_cell_within_its_target_stays() -> None:
    targets = [Target("params", 3_433_798.0)]
    logs = log_probabilities(stages(0))
    assert Repair(NAMED["PDARTS"], [PARAMS], targets, 2).run(logs) == (NAMED["PDARTS"], [])


def test_the_first_swap_loses_least_log_probability_per_parameter_saved() -> None:
    logs = log_probabilities(stages(3))
    genotype = NAMED["PDARTS"]
    target = Target("params", PARAMS.of(genotype) - 1)
    rates = {}
    for kind in CELL_TYPES:
        for pair, (op, source) in enumerate(getattr(genotype, kind)):
            edge, old = edge_index(pair // 2, source), PRIMITIVES.index(op)
            for new in range(1, 8):
                saved = min(PARAMS.ops[kind][edge, old] - PARAMS.ops[kind][edge, new], 1)
                is_third_skip = kind == "normal" and PRIMITIVES[new] == "skip_connect"
                if saved > 0 and not is_third_skip:
                    loss = logs[kind][edge, old] - logs[kind][edge, new]
                    rates[kind, pair // 2, source, PRIMITIVES[new]] = loss / saved
    best = min(rates, key=rates.__getitem__)
    _, swaps = Repair(genotype, [PARAMS], [target], 2).run(logs)
    assert [(s.cell, s.node, s.source, s.after) for s in swaps] == [best]
    assert swaps[0].loss == pytest.approx(rates[best])


def clashing_tables() -> list[CostTable]:
    """Two resources in which what one saves the other pays, but for one op in between."""
    tables = []
    for resource, cheap, dear in (("params", 4, 5), ("macs", 5, 4)):
        ops = np.full((14, 8), 10.0)
        ops[:, cheap], ops[:, dear], ops[:, 6] = 1.0, 9.0, 4.0
        tables.append(CostTable(resource, 0.0, {kind: ops.copy() for kind in CELL_TYPES}))
    return tables


def test_clashing_targets_end_in_a_feasible_cell() -> None:
    tables = clashing_tables()
    targets = [Target("params", 70.0), Target("macs", 70.0)]
    logs = log_probabilities(stages(1))
    pairs = [("sep_conv_3x3", source) for _ in range(4) for source in (0, 1)]
    genotype = Genotype(pairs, [2, 3, 4, 5], list(pairs), [2, 3, 4, 5])
    fixed, _ = Repair(genotype, tables, targets, 2).run(logs)
    assert all(one.of(fixed) <= 70 for one in tables)


def test_when_no_single_swap_helps_the_cheapest_choice_is_the_way_out() -> None:
    """Cheap edges hold the skips that the dear edge needs: no swap alone saves anything."""
    ops = {kind: np.ones((14, 8)) for kind in CELL_TYPES}
    ops["normal"][13] = 10
    ops["normal"][:, PRIMITIVES.index("skip_connect")] = 0
    table = CostTable("memory", 0.0, ops)
    logs = log_probabilities(stages(2))
    assert NAMED["PDARTS"].normal[7] == ("dil_conv_5x5", 4)
    assert table.of(NAMED["PDARTS"]) == 23
    fixed, swaps = Repair(NAMED["PDARTS"], [table], [Target("memory", 15.0)], 2).run(logs)
    assert table.of(fixed) == 14
    assert fixed.normal[7] == ("skip_connect", 4)
    assert count_skips(fixed.normal) == 2
    # All that could be put back was: the dear edge got its skip from one of the two cheap ones.
    assert len(swaps) == 2
    with pytest.raises(UsageError, match="not even the cheapest cell"):
        Repair(NAMED["PDARTS"], [table], [Target("memory", 13.0)], 2).run(logs)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"params": 1.3e6}, "params=1.300 M but the cheapest cell needs 1.370 M"),
        ({"macs": 1e8}, "macs=100.000 M but the cheapest cell needs 227.272 M"),
        ({"params": 3e6, "macs": 1e8}, "macs=100.000 M"),
    ],
    ids=["params", "macs", "one-of-two"],
)
def test_what_no_cell_can_meet_is_refused(limits: dict[str, float], message: str) -> None:
    by_name = {"params": PARAMS, "macs": MACS}
    targets = [Target(name, limit) for name, limit in limits.items()]
    with pytest.raises(UsageError, match="--target cannot be met") as caught:
        require_feasible([by_name[name] for name in limits], targets, 2)
    assert message in str(caught.value)


def test_exactly_the_cheapest_cell_is_feasible() -> None:
    require_feasible([PARAMS], [Target("params", PARAMS.fixed)], 0)


@pytest.mark.parametrize("cap", [0, 1, 8])
def test_the_cheapest_choice_is_cheapest_under_the_cap(cap: int) -> None:
    """Against all choices of one node's two operations, others fixed at the cheapest."""
    repair = Repair(NAMED["PDARTS"], [MEMORY], [Target("memory", 1.0)], cap)
    best = repair.cheapest()
    assert sum(op == 3 for op in best[:8]) <= cap
    for ops in itertools.product(range(1, 8), repeat=2):
        trial = [*ops, *best[2:]]
        if sum(op == 3 for op in trial[:8]) <= cap:
            assert repair.violation(trial) >= repair.violation(best)
