"""Mean, spread and agreement against numpy and against counting pair by pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pdarts_fast.genotype import DARTS_V1, DARTS_V2, PDARTS
from pdarts_fast.search_space import edges
from pdarts_fast.sweep.statistics import agreement, spread


@pytest.mark.parametrize("count", [2, 3, 8], ids=lambda count: f"n{count}")
def test_spread_is_mean_and_sample_deviation(count: int) -> None:
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    got = spread(values.tolist())
    assert got.count == count
    assert got.mean == pytest.approx(values.mean(), rel=1e-12)
    assert got.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert (got.lowest, got.highest) == (values.min(), values.max())


def test_spread_of_one_value_has_no_deviation() -> None:
    got = spread([0.5])
    assert (got.count, got.mean, got.deviation) == (1, 0.5, None)


def test_spread_leaves_out_what_is_not_known_or_not_finite() -> None:
    assert spread([None, 1.0, float("nan"), 3.0, float("inf")]) == spread([1.0, 3.0])
    assert spread([None, float("nan")]).mean is None


def test_agreement_counts_pairs_edge_by_edge() -> None:
    cells = [PDARTS.normal, DARTS_V1.normal, DARTS_V2.normal, DARTS_V2.normal]
    tables = [
        {(place // 2, source): op for place, (op, source) in enumerate(cell)} for cell in cells
    ]
    got = agreement(cells)
    assert got is not None
    assert [(edge.node, edge.source) for edge in got.edges] == edges()
    pairs = list(itertools.combinations(tables, 2))
    for edge in got.edges:
        key = (edge.node, edge.source)
        assert edge.choices == tuple(table.get(key) for table in tables)
        alike = np.mean([one.get(key) == other.get(key) for one, other in pairs])
        assert edge.agreement == pytest.approx(alike)
    assert got.mean == pytest.approx(np.mean([edge.agreement for edge in got.edges]))
    shared = np.mean([len(set(one.items()) & set(other.items())) / 8 for one, other in pairs])
    assert got.shared == pytest.approx(shared)
    assert 0 < got.shared < got.mean < 1


def test_equal_cells_agree_fully_and_disjoint_ones_share_nothing() -> None:
    same = agreement([PDARTS.reduce] * 3)
    assert same is not None
    assert (same.mean, same.shared) == (1.0, 1.0)
    one = [("skip_connect", 0), ("skip_connect", 1)]
    other = [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)]
    apart = agreement([one, other])
    assert apart is not None
    assert (apart.mean, apart.shared) == (0.0, 0.0)


def test_agreement_needs_two_cells_of_one_size() -> None:
    assert agreement([PDARTS.normal]) is None
    with pytest.raises(ValueError, match=r"cells of \[1, 4\] nodes"):
        agreement([PDARTS.normal, [("skip_connect", 0), ("skip_connect", 1)]])
