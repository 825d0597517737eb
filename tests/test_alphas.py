"""Reading and writing alphas.json."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pdarts_fast.alphas import load_alphas, save_alphas
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.search_space import CELL_TYPES


def _stages():
    rng = np.random.default_rng(0)
    return [
        {cell: rng.normal(scale=1e-3, size=(14, k)).astype(np.float32) for cell in CELL_TYPES}
        for k in (8, 5, 3)
    ]


def test_round_trip_is_exact(tmp_path):
    stages = _stages()
    stages[0]["normal"][0, :4] = [0.0, -1e-45, 3.4e38, 1 / 3]
    save_alphas(tmp_path / "alphas.json", stages)
    for source in (tmp_path, str(tmp_path / "alphas.json")):
        loaded = load_alphas(source)
        for got, want in zip(loaded, stages, strict=True):
            for cell in CELL_TYPES:
                assert got[cell].dtype == np.float32
                np.testing.assert_array_equal(got[cell], want[cell])


def test_file_has_one_edge_a_line(tmp_path):
    save_alphas(tmp_path / "alphas.json", _stages())
    text = (tmp_path / "alphas.json").read_text()
    data = json.loads(text)
    assert list(data) == ["primitives", "stages"]
    assert data["primitives"] == list(PRIMITIVES)
    assert sum(line.startswith("        [") for line in text.splitlines()) == 3 * 2 * 14


def _content(**changes):
    stage = {cell: np.zeros((14, 8)).tolist() for cell in CELL_TYPES}
    return json.dumps({"primitives": PRIMITIVES, "stages": [stage]} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "cannot be read as JSON", id="empty"),
        pytest.param("[1, 2", "cannot be read as JSON", id="half"),
        pytest.param(b"\xff\xfe\x00", "cannot be read as JSON", id="binary"),
        pytest.param("[" * 100_000, "cannot be read as JSON", id="deep"),
        pytest.param("[]", "wanted {", id="list"),
        pytest.param(_content(stages=3), "wanted {", id="no-stages"),
        pytest.param(_content(stages=[]), "stages: wanted at least one", id="no-stage"),
        pytest.param(_content(primitives=PRIMITIVES[::-1]), "in this order", id="other-order"),
        pytest.param(_content(stages=[{"normal": []}]), "stage 1: normal has shape", id="no-rows"),
        pytest.param(
            _content(stages=[7]),
            "stage 1: wanted normal and reduce, got int",
            id="number-for-stage",
        ),
    ],
)
def test_malformed_file_is_one_line_naming_it(tmp_path, content, message):
    path = tmp_path / "alphas.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as error:
        load_alphas(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"no alphas\.json in it"):
        load_alphas(tmp_path)
    with pytest.raises(UsageError, match="neither a run directory nor"):
        load_alphas(tmp_path / "nothing")
