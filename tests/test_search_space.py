"""Edges, switch tables, dropping, deriving and skip restriction, against golden decisions."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES, check_genotype, count_skips
from pdarts_fast.search_space import (
    CELL_TYPES,
    all_switches,
    check_alphas,
    derive,
    drop_ops,
    edge_index,
    edges,
    entropy,
    final_drop,
    genotype_of,
    live_names,
    live_ops,
    node_edges,
    num_nodes,
    probabilities,
    restrict_skips,
)

GOLDEN = Path(__file__).parent / "golden" / "decisions.json.gz"
CASES = json.loads(gzip.decompress(GOLDEN.read_bytes()))["cases"]
NONE, MAX, AVG, SKIP, SEP3 = range(5)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: f"case{case}")
def test_golden_decisions(case):
    golden = CASES[case]
    derivation = derive(golden["alphas"])
    for stage, (tables, golden_tables) in enumerate(
        zip(derivation.switches, golden["switches"], strict=True), start=1
    ):
        for cell in CELL_TYPES:
            wrong = np.argwhere(tables[cell] != np.array(golden_tables[cell])).tolist()
            assert not wrong, f"stage {stage} {cell}: wrong [edge, op] {wrong}"
    assert derivation.genotype == check_genotype(golden["genotype"])
    changed = {entry["max_skip"]: entry["genotype"] for entry in golden["restricted"]}
    expected = derivation.genotype
    assert list(derivation.restricted) == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    for most, got in derivation.restricted.items():
        expected = check_genotype(changed.get(most, expected))
        assert got == expected, f"at most {most} skips"


def test_golden_covers_all_and_exercises_restriction():
    assert len(CASES) == 200
    assert sum(len(case["restricted"]) for case in CASES) > 300


def test_edges_node_by_node_then_by_source():
    assert edges() == [
        *[(0, 0), (0, 1)],
        *[(1, 0), (1, 1), (1, 2)],
        *[(2, 0), (2, 1), (2, 2), (2, 3)],
        *[(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)],
    ]


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7])
def test_edge_helpers_agree(nodes):
    listed = edges(nodes)
    assert num_nodes(len(listed)) == nodes
    assert [edge_index(node, source) for node, source in listed] == list(range(len(listed)))
    assert [e for node in range(nodes) for e in node_edges(node)] == list(range(len(listed)))


@pytest.mark.parametrize("count", [-1, 0, 1, 3, 13, 15])
def test_num_nodes_refuses(count):
    with pytest.raises(UsageError, match=f"no cell has {count} edges"):
        num_nodes(count)


def test_all_switches_and_names():
    switches = all_switches()
    assert live_ops(switches) == 8
    assert switches["normal"].shape == (14, 8)
    switches["normal"][3, NONE] = False
    assert live_names(switches["normal"])[2:4] == [list(PRIMITIVES), list(PRIMITIVES[1:])]
    assert switches["reduce"].all()


def test_probabilities_over_ops_and_over_edges_for_one_op():
    rng = np.random.default_rng(0)
    for ops, axis in ((8, 1), (3, 1), (1, 0)):
        alphas = rng.normal(size=(14, ops)).astype(np.float32)
        exact = np.exp(alphas.astype(np.float64))
        exact /= exact.sum(axis=axis, keepdims=True)
        got = probabilities(alphas)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert probabilities([[1000.0, -1000.0]] * 2).tolist() == [[1, 0]] * 2


def test_entropy_in_nats():
    assert entropy(np.zeros((14, 5))) == pytest.approx(math.log(5))
    assert entropy([[200.0, 0.0], [0.0, 0.0]]) == pytest.approx(math.log(2) / 2)
    assert entropy(np.ones((14, 1))) == 0


def _stage(rows, nodes=1, fill=0.0):
    """Alphas of a cell type whose first edges have the given rows; both cell types alike."""
    table = np.full((len(edges(nodes)), len(rows[0])), fill, dtype=np.float32)
    table[: len(rows)] = rows
    return {cell: table.copy() for cell in CELL_TYPES}


def _switches(ops, nodes=1):
    table = np.zeros((len(edges(nodes)), len(PRIMITIVES)), dtype=bool)
    table[:, ops] = True
    return {cell: table.copy() for cell in CELL_TYPES}


def test_drop_ties_remove_lower_index_without_protecting_none():
    dropped = drop_ops(all_switches(1), _stage([[0.0] * 8, [0, 1, 1, 0, 1, 0, 1, 1]]), 3)
    assert np.flatnonzero(~dropped["normal"][0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(~dropped["normal"][1]).tolist() == [0, 3, 5]


def test_float32_cannot_tell_ties_apart():
    alphas = _stage([[1e-9, 0.0, 1e-9]])
    assert live_names(drop_ops(_switches([MAX, AVG, SKIP]), alphas, 1)["normal"])[0] == [
        "avg_pool_3x3",
        "skip_connect",
    ]


def test_final_drop_removes_none_first():
    alphas = _stage([[5.0, 0.0, 1.0], [5.0, 1.0, 1.0]])
    final = final_drop(_switches([NONE, SKIP, SEP3]), alphas)
    assert live_names(final["normal"]) == [["sep_conv_3x3"], ["sep_conv_3x3"]]
    final = final_drop(_switches([MAX, SKIP, SEP3]), alphas)
    assert live_names(final["normal"]) == [["max_pool_3x3"], ["max_pool_3x3"]]


@pytest.mark.parametrize(
    ("rows", "sources"),
    [
        pytest.param([[0, 0, 0.1], [0, 0, 0.3], [0, 0, 0.2]], [1, 2], id="best-two-in-edge-order"),
        pytest.param([[0, 0, 0.3], [0, 0, 0.1], [0, 0, 0.2]], [0, 2], id="worst-between"),
        pytest.param([[0, 0, 1]] * 3, [1, 2], id="ties-take-higher-index"),
        pytest.param([[9, 0, 0.1], [0, 0, 0.1], [9, 0, 0]], [0, 1], id="none-does-not-count"),
    ],
)
def test_node_keeps_two_best_edges(rows, sources):
    alphas = _stage([[0, 0, 0], [0, 0, 0], *rows], nodes=2)
    genotype = genotype_of(_switches([NONE, SKIP, SEP3], nodes=2), alphas)
    assert genotype.normal[2:] == [("sep_conv_3x3", source) for source in sources]
    assert [source for _, source in genotype.normal[:2]] == [0, 1]
    assert genotype.normal_concat == genotype.reduce_concat == [2, 3]


def test_restriction_bars_weakest_skip_first_and_leaves_reduction_cell():
    alphas = _stage([[0, 2, 1], [0, 3, 1]])
    restricted = restrict_skips(_switches([NONE, SKIP, SEP3]), alphas)
    skip, sep3 = "skip_connect", "sep_conv_3x3"
    assert list(restricted) == [2, 1, 0]
    assert restricted[2].normal == [(skip, 0), (skip, 1)]
    assert restricted[1].normal == [(sep3, 0), (skip, 1)]
    assert restricted[0].normal == [(sep3, 0), (sep3, 1)]
    assert all(genotype.reduce == restricted[2].reduce for genotype in restricted.values())


def test_restriction_ends_where_it_cannot_go_on():
    restricted = restrict_skips(_switches([NONE, SKIP]), _stage([[0, 2], [0, 3]]))
    assert list(restricted) == [2]


def test_restriction_survives_underflow():
    alphas = _stage([[500, -500, -500], [-500, 500, -500]])
    restricted = restrict_skips(_switches([NONE, AVG, SKIP]), alphas)
    assert count_skips(restricted[2].normal) == 1
    assert restricted[0].normal == [("avg_pool_3x3", 0), ("avg_pool_3x3", 1)]


NUMBERS = st.floats(-200, 200, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-8])


@st.composite
def searches(draw):
    nodes = draw(st.integers(1, 5))
    widths = [8, *sorted(draw(st.lists(st.integers(3, 8), max_size=3)), reverse=True)]
    shape = len(edges(nodes))
    return [
        {cell: draw(arrays(np.float32, (shape, width), elements=NUMBERS)) for cell in CELL_TYPES}
        for width in widths
    ]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(searches())
def test_properties_of_any_search(stages):
    derivation = derive(stages)
    nodes = num_nodes(len(stages[0]["normal"]))
    widths = [stage["normal"].shape[1] for stage in stages[1:]] + [1]
    before = all_switches(nodes)
    for width, after in zip(widths, derivation.switches, strict=True):
        assert live_ops(after) == width
        assert all((before[cell] | ~after[cell]).all() for cell in CELL_TYPES)
        before = after
    last = derivation.switches[-1]
    for cell, pairs in zip(CELL_TYPES, derivation.genotype[::2], strict=True):
        names = live_names(last[cell])
        for i, (op, source) in enumerate(pairs):
            assert [op] == names[edge_index(i // 2, source)]
    assert list(derivation.restricted) == list(range(2 * nodes, -1, -1))
    for most, genotype in derivation.restricted.items():
        assert check_genotype(genotype) == genotype
        assert count_skips(genotype.normal) <= most
        assert genotype.reduce == derivation.genotype.reduce
        if most >= count_skips(derivation.genotype.normal):
            assert genotype == derivation.genotype


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arrays(np.float32, (14, 8), elements=NUMBERS), st.integers(0, 7))
def test_what_is_dropped_is_less_probable(alphas, k):
    tables = all_switches()
    dropped = drop_ops(tables, {"normal": alphas, "reduce": alphas}, k)
    assert live_ops(dropped) == 8 - k
    assert live_ops(tables) == 8
    weights = probabilities(alphas)
    for row, kept in zip(weights, dropped["normal"], strict=True):
        assert k == 0 or row[~kept].max() <= row[kept].min()


def test_derive_goes_on_from_given_switches():
    first, *rest = CASES[3]["alphas"]
    switches = drop_ops(all_switches(), first, 3)
    whole, part = derive(CASES[3]["alphas"]), derive(rest, switches)
    assert part.genotype == whole.genotype
    assert part.restricted == whole.restricted
    assert len(part.switches) == 2


def test_alphas_are_not_changed():
    stage = check_alphas(CASES[1]["alphas"][2])
    before = {cell: stage[cell].copy() for cell in CELL_TYPES}
    restrict_skips(derive(CASES[1]["alphas"]).switches[1], stage)
    for cell in CELL_TYPES:
        np.testing.assert_array_equal(stage[cell], before[cell])


GOOD = np.zeros((14, 8))
NOT_FINITE = np.where(np.arange(112).reshape(14, 8) == 10, np.nan, 0.0)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        pytest.param([], "at least one stage", id="no-stage"),
        pytest.param([GOOD], "stage 1: wanted normal and reduce, got ndarray", id="no-mapping"),
        pytest.param([{"normal": GOOD}], "stage 1: has no reduce", id="no-reduce"),
        pytest.param([{"normal": GOOD[0], "reduce": GOOD}], r"normal has shape \[8\]", id="1-d"),
        pytest.param(
            [{"normal": [[1.0], [1.0, 2.0]], "reduce": GOOD}], "normal is no table", id="ragged"
        ),
        pytest.param([{"normal": [["a"]], "reduce": GOOD}], "no table of numbers", id="text"),
        pytest.param([{"normal": GOOD[:, :0], "reduce": GOOD}], "1 to 8 ops", id="no-ops"),
        pytest.param([{"normal": np.zeros((14, 9)), "reduce": GOOD}], "1 to 8 ops", id="9-ops"),
        pytest.param([{"normal": GOOD[:13], "reduce": GOOD}], "no cell has 13", id="13-edges"),
        pytest.param(
            [{"normal": NOT_FINITE, "reduce": GOOD}], r"normal\[1\]\[2\] is nan", id="nan"
        ),
        pytest.param([{"normal": GOOD + 1e39, "reduce": GOOD}], "is inf", id="over-float32"),
        pytest.param([{"normal": GOOD, "reduce": GOOD[:, :5]}], "equal shapes", id="unequal"),
        pytest.param(
            [{"normal": GOOD[:, :5], "reduce": GOOD[:, :5]}],
            "14 by 5 but the switches have 14 edges with 8 live",
            id="first-stage-too-narrow",
        ),
        pytest.param(
            [*[{"normal": GOOD, "reduce": GOOD}], {"normal": GOOD[:9], "reduce": GOOD[:9]}],
            "stage 2: alphas are 9 by 8 after 14 by 8",
            id="other-edges",
        ),
        pytest.param(
            [{"normal": GOOD[:, :width], "reduce": GOOD[:, :width]} for width in (8, 3, 5)],
            "stage 3: alphas are 14 by 5 after 14 by 3",
            id="ops-come-back",
        ),
    ],
)
def test_malformed_alphas_are_one_line(alphas, message):
    with pytest.raises(UsageError, match=message) as error:
        derive(alphas)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [-1, 8, 9])
def test_drop_refuses_impossible_count(k):
    with pytest.raises(UsageError, match=f"cannot drop {k} ops of 8"):
        drop_ops(all_switches(), {"normal": GOOD, "reduce": GOOD}, k)


def _broken(edge, op, value):
    switches = all_switches()
    switches["reduce"][edge, op] = value
    return switches


TABLE = np.ones((14, 8), dtype=bool)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        pytest.param(None, "has no normal", id="none"),
        pytest.param({"normal": TABLE}, "has no reduce", id="no-reduce"),
        pytest.param({"normal": GOOD, "reduce": GOOD}, "is float64", id="floats"),
        pytest.param({"normal": [[True], [True, False]], "reduce": TABLE}, "normal", id="ragged"),
        pytest.param({"normal": TABLE[:, :7], "reduce": TABLE}, r"bool \[14, 7\]", id="7-ops"),
        pytest.param({"normal": TABLE[:3], "reduce": TABLE}, "no cell has 3", id="3-edges"),
        pytest.param({"normal": TABLE[:9], "reduce": TABLE}, "different numbers", id="unequal"),
        pytest.param(_broken(4, 2, False), "7 to 8 live ops", id="uneven"),
        pytest.param({"normal": ~TABLE, "reduce": ~TABLE}, "0 to 0 live ops", id="all-dead"),
    ],
)
def test_malformed_switches_are_one_line(switches, message):
    with pytest.raises(UsageError, match=message) as error:
        live_ops(switches)
    assert "\n" not in str(error.value)
