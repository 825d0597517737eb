"""Genotypes: validation, named cells, JSON, and the text that scripts print and log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import (
    DARTS_V2,
    NAMED,
    OPERATIONS,
    PDARTS,
    PRIMITIVES,
    Genotype,
    check_genotype,
    count_skips,
    genotype_to_json,
    genotypes_in_text,
    load_genotype,
    save_genotype,
)

ONE_NODE = Genotype([("skip_connect", 0), ("none", 1)], [2], [("sep_conv_3x3", 1)] * 2, [2])


@st.composite
def cells(draw, max_nodes=5):
    nodes = draw(st.integers(1, max_nodes))
    pairs = [
        (draw(st.sampled_from(OPERATIONS)), draw(st.integers(0, 1 + i // 2)))
        for i in range(2 * nodes)
    ]
    states = st.integers(2, 1 + nodes)
    return pairs, draw(st.lists(states, min_size=1, max_size=nodes, unique=True))


@st.composite
def genotypes(draw):
    return Genotype(*draw(cells()), *draw(cells()))


def test_primitives_are_in_contract_order():
    assert (
        *("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"),
        *("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    ) == PRIMITIVES
    assert (*PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7") == OPERATIONS


def test_import_needs_no_torch():
    code = (
        "import sys, pdarts_fast.genotype, pdarts_fast.search_space, pdarts_fast.alphas;"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("name", NAMED)
def test_named_cells_concatenate_every_state_that_no_node_reads(name):
    genotype = load_genotype(name)
    for cell, concat in (genotype[:2], genotype[2:]):
        unread = set(range(2, 2 + len(cell) // 2)) - {source for _, source in cell}
        assert unread <= set(concat)
        if name in ("NASNet", "AmoebaNet"):
            assert len(cell) == 10
            assert unread == set(concat)
        else:
            assert (len(cell), concat) == (8, [2, 3, 4, 5])


def test_pdarts_is_the_published_cell():
    names = {"skip": "skip_connect", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5"}
    names |= {"sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "max": "max_pool_3x3"}
    names["avg"] = "avg_pool_3x3"

    def cell(text):
        words = text.replace("|", "").split()
        return [(names[op], int(source)) for op, source in zip(*[iter(words)] * 2, strict=True)]

    assert PDARTS.normal == cell("skip 0 dil3 1 | skip 0 sep3 1 | sep3 1 sep3 3 | sep3 0 dil5 4")
    assert PDARTS.reduce == cell("avg 0 sep5 1 | sep3 0 dil5 2 | max 0 dil3 1 | dil3 1 dil5 3")
    assert DARTS_V2.normal == cell("sep3 0 sep3 1 | sep3 0 sep3 1 | sep3 1 skip 0 | skip 0 dil3 2")
    assert DARTS_V2.reduce == cell("max 0 max 1 | skip 2 max 1 | max 0 skip 2 | skip 2 max 1")
    assert count_skips(PDARTS.normal) == 2


def test_named_genotype_is_a_copy():
    load_genotype("PDARTS").normal.clear()
    assert len(load_genotype("PDARTS").normal) == 8


@settings(max_examples=50, deadline=None, derandomize=True)
@given(genotypes())
def test_json_round_trip(genotype):
    text = genotype_to_json(genotype)
    assert check_genotype(json.loads(text)) == genotype
    assert max(map(len, text.splitlines())) <= 100


@settings(max_examples=50, deadline=None, derandomize=True)
@given(genotypes())
def test_text_round_trip(genotype):
    assert load_genotype(str(genotype)) == genotype
    assert genotypes_in_text(f"12:00 PM genotype = {genotype}, done (ok)") == [(1, genotype)]


def test_json_is_readable():
    assert genotype_to_json(ONE_NODE) == (
        '{\n  "normal": [\n    ["skip_connect", 0], ["none", 1]\n  ],\n  "normal_concat": [2],\n'
        '  "reduce": [\n    ["sep_conv_3x3", 1], ["sep_conv_3x3", 1]\n  ],\n'
        '  "reduce_concat": [2]\n}'
    )


def test_run_file_round_trip(tmp_path):
    restricted = {8: NAMED["DARTS_V1"], 2: PDARTS, 0: DARTS_V2}
    path = tmp_path / "genotype.json"
    save_genotype(path, PDARTS, max_skips=2, unrestricted=NAMED["DARTS_V1"], restricted=restricted)
    data = json.loads(path.read_text())
    assert list(data) == ["genotype", "max_skips", "unrestricted", "restricted"]
    assert data["max_skips"] == 2
    assert check_genotype(data["unrestricted"]) == NAMED["DARTS_V1"]
    assert list(data["restricted"]) == ["8", "2", "0"]
    assert load_genotype(tmp_path) == load_genotype(path) == load_genotype(str(path)) == PDARTS
    assert load_genotype(tmp_path, max_skips=0) == DARTS_V2
    assert [entry.name for entry in tmp_path.iterdir()] == ["genotype.json"]


def test_bare_file_round_trip(tmp_path):
    save_genotype(tmp_path / "cell.json", NAMED["AmoebaNet"])
    assert set(json.loads((tmp_path / "cell.json").read_text())) == set(Genotype._fields)
    assert load_genotype(tmp_path / "cell.json") == NAMED["AmoebaNet"]


def test_save_into_missing_folder_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"nowhere.*genotype\.json"):
        save_genotype(tmp_path / "nowhere" / "genotype.json", PDARTS)


PYTHON_FILE = """from collections import namedtuple
Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
class Genotype(tuple): "A Genotype (of a cell)."
FOUND = Genotype(
    normal=[
        ('skip_connect', 0), # a comment (
        ("none", 1),
    ],
    normal_concat=range(2, 3), reduce=(['sep_conv_3x3', 1], ('sep_conv_3x3', 1)),
    reduce_concat=[2])
"""
LINE = (
    "Genotype(normal=[('skip_connect', 0), ('none', 1)], normal_concat=range(2, 3), "
    "reduce=[('sep_conv_3x3', 1), ('sep_conv_3x3', 1)], reduce_concat=range(2, 3))"
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(LINE, id="printed"),
        pytest.param(f"01/02 10:11:12 AM {LINE}\n01/02 10:12 AM {LINE}\n", id="logged-twice"),
        pytest.param(PYTHON_FILE, id="python-file"),
        pytest.param(LINE.replace("normal=", "").replace("normal_concat=", ""), id="positional"),
        pytest.param(f"\ufeff{json.dumps(ONE_NODE._asdict())}", id="json-with-byte-order-mark"),
    ],
)
def test_load_from_text_file(tmp_path, text):
    (tmp_path / "log.txt").write_text(text, encoding="utf-8")
    assert load_genotype(tmp_path / "log.txt") == ONE_NODE


def test_genotypes_in_text_gives_lines():
    text = f"start\n{LINE}\n\n\nx {PDARTS} and {LINE}"
    assert genotypes_in_text(text) == [(2, ONE_NODE), (5, PDARTS), (5, ONE_NODE)]


def test_text_is_never_run(tmp_path):
    trap = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    for text in (f"Genotype(normal=[{code}])", f"Genotype(normal=range({code}))"):
        with pytest.raises(UsageError, match="plain list"):
            load_genotype(text)
    assert not trap.exists()


def _line(old, new):
    assert old in LINE
    return LINE.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("epoch 1 loss 2.3", "holds neither", id="no-genotype"),
        pytest.param("", "holds neither", id="empty"),
        pytest.param("see Genotype(s) in the paper", "holds neither", id="prose"),
        pytest.param(f"{LINE}\n{PDARTS}", r"2 genotypes that differ \(lines 1, 2\)", id="differ"),
        pytest.param(f"\n{LINE[:-1]}", "line 2: .*never closed", id="not-closed"),
        pytest.param(_line("[(", "[(("), "never closed|not well formed", id="unbalanced"),
        pytest.param(
            _line("('none', 1)]", "('none', 1)"), "never closed|not well formed", id="bracket"
        ),
        pytest.param(_line("range(2, 3)", "range(2, 10**9)"), "normal_concat is", id="expression"),
        pytest.param(_line("range(2, 3)", "range(2, 99999999)"), "normal_concat is", id="huge"),
        pytest.param(_line("range(2, 3)", "range(2, 3, 0)"), "normal_concat is", id="zero-step"),
        pytest.param(_line("range(2, 3)", "list(2, 3)"), "normal_concat is", id="other-call"),
        pytest.param(_line("range(2, 3)", "range(2, 2)"), "got \\[\\]", id="empty-range"),
        pytest.param(_line("reduce=", "normal="), "gives normal twice", id="field-twice"),
        pytest.param(_line("reduce_concat=", "concat="), "lacks reduce_concat", id="misnamed"),
        pytest.param(LINE[:-1] + ", more=1)", "unknown more", id="extra-field"),
        pytest.param(LINE[:-1] + ", **more)", "not a plain", id="starred"),
        pytest.param("Genotype([], [], [], [], [])", "5 values, wanted 4", id="five-values"),
        pytest.param("Genotype(normal=" + "[" * 5000 + "]" * 5000 + ")", "not well", id="deep"),
        pytest.param('{"normal": [', "is not JSON", id="half-json"),
        pytest.param("{" * 100_000, "is not JSON", id="deep-json"),
        pytest.param("{}", "lacks normal, normal_concat, reduce", id="empty-json"),
        pytest.param('{"genotype": 3}', "genotype: wanted the four fields", id="json-number"),
    ],
)
def test_malformed_file_is_one_line_naming_it(tmp_path, text, message):
    path = tmp_path / "old.log"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_genotype(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param("normal", [], r"normal: wanted two .* got \[\]", id="no-pairs"),
        pytest.param("normal", "skip", "normal: wanted two", id="string-for-cell"),
        pytest.param("reduce", [("none", 0)], "reduce: wanted two", id="odd-pairs"),
        pytest.param("normal", [("none", 0), 3], r"normal\[1\]: wanted a pair", id="no-pair"),
        pytest.param("normal", [("none", 0), (1, 1)], r"normal\[1\]: wanted a pair", id="op-int"),
        pytest.param(
            "reduce", [("conv", 0), ("none", 1)], r"reduce\[0\]: wanted one of none, .*'conv'"
        ),
        pytest.param(
            "normal", [("none", 0), ("none", 2)], r"normal\[1\]: wanted a source from 0 to 1, got 2"
        ),
        pytest.param("normal", [("none", 0), ("none", -1)], "got -1", id="negative-source"),
        pytest.param("normal", [("none", 0), ("none", True)], "got True", id="bool-source"),
        pytest.param("normal", [("none", 0), ("none", 1.0)], "got 1.0", id="float-source"),
        pytest.param("normal_concat", [], "normal_concat: wanted different states", id="no-state"),
        pytest.param("normal_concat", [3], "states from 2 to 2, got", id="state-too-large"),
        pytest.param("reduce_concat", [1], "reduce_concat: .* got", id="input-state"),
        pytest.param("reduce_concat", [2, 2], "different states", id="state-twice"),
        pytest.param("reduce_concat", range(10**12), "different states", id="huge-range"),
        pytest.param("reduce_concat", "2", "different states", id="string-for-states"),
    ],
)
def test_check_names_field(field, value, message):
    with pytest.raises(UsageError, match=message) as error:
        check_genotype(ONE_NODE._replace(**{field: value}), "cell.json")
    assert str(error.value).startswith("cell.json: ")


def test_check_accepts_ranges_and_tuples():
    loose = (tuple(map(list, ONE_NODE.normal)), range(2, 3), tuple(ONE_NODE.reduce), (2,))
    checked = check_genotype(loose)
    assert checked == ONE_NODE
    assert isinstance(checked.normal[0], tuple)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: "PDART", "'PDART': neither a file.*PDARTS", id="unknown-name"),
        pytest.param(lambda path: path, "no genotype.json in it", id="unfinished-run"),
        pytest.param(lambda path: path / "x", "neither a file", id="missing-path"),
        pytest.param(lambda path: "x" * 5000, "neither a file", id="long-name"),
        pytest.param(lambda path: "a\0b", "neither a file", id="null-byte"),
    ],
)
def test_missing_source(tmp_path, make, message):
    with pytest.raises(UsageError, match=message) as error:
        load_genotype(make(tmp_path))
    assert len(str(error.value)) < 400


def test_binary_file(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(UsageError, match=r"weights\.pt: cannot be read as text"):
        load_genotype(tmp_path / "weights.pt")


def test_max_skips_needs_a_run_that_has_it(tmp_path):
    path = tmp_path / "genotype.json"
    save_genotype(path, PDARTS, max_skips=2, restricted={2: PDARTS})
    with pytest.raises(UsageError, match=r"at most 1 skips \(has 2\)"):
        load_genotype(path, max_skips=1)
    save_genotype(path, PDARTS)
    (tmp_path / "log.txt").write_text(str(PDARTS))
    for source in (path, tmp_path / "log.txt", "PDARTS", str(PDARTS)):
        with pytest.raises(UsageError, match=r"asked of a run|one genotype only"):
            load_genotype(source, max_skips=2)
