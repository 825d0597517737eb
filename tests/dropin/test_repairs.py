"""Repairs of old sources: what is rewritten, and what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.dropin.repairs import repair

CASES: dict[str, tuple[str, Any]] = {
    "view-of-a-transposed": ("torch.arange(4).view(2, 2).t().view(-1).tolist()", [0, 2, 1, 3]),
    "view-shares-memory": ("torch.arange(4).view(2, 2)._base is not None", True),
    "view-as-dtype": ("torch.zeros(1).view(torch.int32).item()", 0),
    "view-of-numpy": ("np.zeros(1, np.float32).view(np.int32).tolist()", [0]),
    "sum-of-generator": ("np.sum(i * i for i in range(3))", 5),
    "sum-of-list": ("np.sum([1, 2]).item()", 3),
    "zero-dim-data": ("torch.tensor(3.0).data[0]", 3.0),
    "data-of-vector": ("torch.tensor([4.0, 5.0]).data[0].item()", 4.0),
    "numpy-alias": ("np.int(2.7), np.float(1)", (2, 1.0)),
    "numpy-names-stay": ("np.float64(1.0).item()", 1.0),
    "volatile": ("dict(volatile=True, a=1)", {"a": 1}),
    "async": ("str.replace('cuda(async=True)', 'a', 'b')", "cudb(bsync=True)"),
}


def run(source: str) -> Any:
    tree, _ = repair(f"result = {source}", "case.py")
    names: dict[str, Any] = {"np": np, "torch": torch}
    exec(compile(tree, "case.py", "exec"), names)
    return names["result"]


@pytest.mark.parametrize(("source", "wanted"), CASES.values(), ids=CASES.keys())
def test_value(source: str, wanted: Any) -> None:
    assert run(source) == wanted


def test_a_view_that_fits_no_shape_still_fails() -> None:
    with pytest.raises(RuntimeError):
        run("torch.zeros(3).view(2, 2)")


def test_lines_and_future_imports_stay() -> None:
    source = '"""Doc."""\nfrom __future__ import annotations\n\nx = f(1, async=True)\n1 / 0\n'
    tree, notes = repair(source, "case.py")
    assert notes == [(4, "async=")]
    code = compile(tree, "case.py", "exec")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code, {"f": lambda *args, **kwargs: kwargs})
    assert caught.traceback[-1].lineno == 4  # counted from 0


def test_other_syntax_errors_are_the_scripts() -> None:
    with pytest.raises(SyntaxError):
        repair("print 'python 2'", "case.py")
