"""The Python snippets of the pages on fused operations and derived networks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["fused-ops", "derived-networks"])
def test_snippets(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})
