"""The snippets of ``docs/drop-in.md`` run; ``test_scripts`` has that of ``pdarts-fast run``."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pdarts_fast.cli import main
from pdarts_fast.dropin import swap
from pdarts_fast.genotype import PDARTS, load_genotype
from pdarts_fast.kernels import backends

PAGE = Path(__file__).parent.parent.parent / "docs" / "drop-in.md"
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_python_snippets(darts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for kind, text in SNIPPETS if kind == "python"]
    assert len(texts) == 2
    # The reader's own module: that of a DARTS script stands in for it.
    monkeypatch.setitem(sys.modules, "model_search", darts)
    first, second = ({}, {})  # type: dict[str, Any], dict[str, Any]
    exec(texts[0], first)
    if backends.available()["cpu"].usable:
        assert any(map(swap.is_swapped, first["model"].modules()))
    exec(texts[1], second)
    assert second["derived"].drop_path_prob == 0
    assert second["operations"].OPS
    assert second["utils"].AvgrageMeter


def test_import_log_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.txt").write_text(f"04:50 genotype = {PDARTS}\n")
    (command,) = [text for kind, text in SNIPPETS if kind == "sh" and "import-log" in text]
    assert main(shlex.split(command)[1:]) == 0
    assert load_genotype("genotype.json") == PDARTS
