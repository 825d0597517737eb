"""The shared tests of the kernels over interpreted Triton kernels, in processes of their own.

``TRITON_INTERPRET=1`` must be set before triton is imported, so each selection of tests/kernels
runs in a process with that variable, two at a time. The interpreter takes milliseconds for every
operation of every program: sizes are those that make a kernel take each of its branches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CELL = "tests/kernels/test_cell.py::test_float32"
AMP = "tests/kernels/test_cell.py::test_amp_is_as_close_as_torch"
PRIMITIVES = "tests/kernels/test_primitives.py"
WHOLE = "tests/kernels/test_whole_cell.py"
GOLDEN = "tests/kernels/test_operator.py::test_golden_networks"

# What of the shared suite runs, by name: arguments of pytest, and how many tests that is.
SELECTIONS = {
    # Every primitive of a cell, C=16 and a C that is no power of two, stride 1 and 2.
    "primitives": (
        [PRIMITIVES, "-k", "not bfloat16 and (affine or mix or (odd and (16 or 48)))"],
        0,
    ),
    "cell-all-operations": ([f"{CELL}[triton-stage1-normal]"], 1),
    "cell-reduction-pruned": ([f"{CELL}[triton-both]"], 1),
    "cell-odd-size-pruned": ([f"{CELL}[triton-stage3-odd-reduction]"], 1),
    "cell-dropout-padded-channels": ([f"{CELL}[triton-dropout-c6]"], 1),
    "cell-evaluation": ([f"{CELL}[triton-evaluation-reduction]"], 1),
    "cell-one-pixel-wide": ([f"{CELL}[triton-one-pixel-wide]"], 1),
    "whole-pass-weights": (
        [WHOLE, "-k", "reduction-odd-weight or evaluation-weight or empty-node"],
        4,
    ),
    "whole-pass-dropout": ([WHOLE, "-k", "normal-dropout"], 2),
    "whole-pass-alphas": (
        [WHOLE, "-k", "wanted or reduction-odd-alpha or evaluation-reduction-alpha"],
        4,
    ),
    "amp": ([f"{AMP}[triton-both]"], 1),
    "golden": ([f"{GOLDEN}[float32-stage3]"], 1),
    "self-check": (["tests/triton_interpret/interpreted.py"], 0),
}


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest over interpreted kernels."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """All wanted selections, two at a time."""
    wanted = [item.callspec.params["name"] for item in request.session.items
              if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, SELECTIONS[name][0]) for name in wanted}


@pytest.mark.parametrize("name", SELECTIONS)
def test_interpreted_kernels_pass(processes: dict[str, Future], name: str) -> None:
    done = processes[name].result()
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    expected = SELECTIONS[name][1]
    assert f"{expected} passed" in last if expected else " passed" in last, last
    assert "skipped" not in last or name == "primitives", last
