"""Logs of old searches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdarts_fast.cli import main
from pdarts_fast.dropin.log_import import read_log
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES, Genotype, load_genotype

STAMP = "11/24 04:50:00 AM "


def genotype(skips: int) -> Genotype:
    """A genotype with that many skips in its normal cell."""
    ops = ["skip_connect"] * skips + ["sep_conv_3x3"] * (8 - skips)
    sources = [0, 1, 0, 1, 0, 1, 0, 1]
    pairs = list(zip(ops, sources, strict=True))
    return Genotype(pairs, [2, 3, 4, 5], [("max_pool_3x3", s) for s in sources], [2, 3, 4, 5])


def table(live: int) -> list[list[bool]]:
    return [[i < live for i in range(8)] for _ in range(14)]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(STAMP + line for line in lines) + "\n")
    return path


@pytest.fixture
def pdarts_log(tmp_path: Path) -> Path:
    names = [
        str([name for name, alive in zip(PRIMITIVES, row, strict=True) if alive])
        for row in table(3)
    ]
    lines = [
        "epoch 0 lr 2.5e-02",
        f"switches_normal = {table(5)}",
        f"switches_reduce = {table(4)}",
        "train 000 1.2 33.3 90.0",
        "------Dropping 2 paths------",
        "switches_normal = ",
        *names,
        "switches_reduce = ",
        *names,
        str(genotype(6)),
        "Restricting skipconnect...",
        *[str(genotype(min(6, m))) for m in range(8, -1, -1)],
    ]
    return write(tmp_path / "log.txt", lines)


def test_pdarts_log(pdarts_log: Path, tmp_path: Path) -> None:
    search = read_log(pdarts_log)
    assert search.genotype == genotype(2)
    assert search.unrestricted == genotype(6)
    assert list(search.restricted) == list(range(8, -1, -1))
    assert search.restricted[8] == search.restricted[6] == genotype(6)
    assert search.restricted[5] == genotype(5)
    assert [len(stage["normal"][0]) for stage in search.switches] == [5, 3]
    assert search.switches[0]["reduce"] == [list(PRIMITIVES[:4])] * 14
    assert read_log(pdarts_log, 4).genotype == genotype(4)
    out = tmp_path / "genotype.json"
    assert main(["import-log", str(pdarts_log), "--out", str(out)]) == 0
    assert load_genotype(out) == genotype(2)
    assert load_genotype(out, max_skips=0) == genotype(0)
    assert json.loads(out.read_text())["switches"][1]["normal"][0] == list(PRIMITIVES[:3])


def test_darts_log_takes_the_last_genotype(tmp_path: Path) -> None:
    lines = []
    for epoch in range(3):
        lines += [
            f"epoch {epoch} lr 0.02",
            f"genotype = {genotype(5 - epoch)}",
            "train 000 1.0 2.0",
        ]
    search = read_log(write(tmp_path / "log.txt", lines))
    assert search.genotype == genotype(3)
    assert (search.max_skips, search.unrestricted, search.switches) == (None, None, [])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["epoch 0"], "no line with Genotype"),
        ([str(genotype(6)), str(genotype(5))], "no genotype with at most 2 skips"),
        (
            ["Genotype(normal=[('warp', 0)] * 2, normal_concat=[2], reduce=[], reduce_concat=[])"],
            "not a plain list",
        ),
    ],
    ids=["nothing", "not-restricted-enough", "no-literal"],
)
def test_wrong_logs_are_one_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_log(write(tmp_path / "log.txt", lines))
    assert "log.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_log(tmp_path / "none.txt")
