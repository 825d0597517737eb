"""Whole scripts through ``pdarts-fast run``: unmodified cells against accelerated ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pdarts_fast.kernels import backends

pytestmark = pytest.mark.skipif(
    not backends.available()["cpu"].usable,
    reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
)

SMALL = ["--steps", "2", "--nodes", "2"]
SEARCHES: dict[str, tuple[str, list[str], list[str]]] = {
    "first-order": ("first_order", ["--cpu"], SMALL),
    "second-order": ("second_order", [], SMALL),
    "second-order-new": ("second_order", [], [*SMALL, "--copy", "new"]),
}
"""Folder of the script, flags of ``run``, flags of the script."""
UNMODIFIED = {
    "first-order": "first-order",
    "second-order": "second-order",
    "second-order-new": "second-order",
}
"""Which search without acceleration has the same numbers."""
PAGE = Path(__file__).parent.parent.parent / "docs" / "drop-in.md"


def documented(scripts: Path) -> list[str]:
    """The command line of the page on the drop-in, for a small search."""
    line = re.search(r"^pdarts-fast (run .*)$", PAGE.read_text(), re.MULTILINE)
    assert line is not None
    script = str(scripts / "first_order" / "train_search.py")
    argv = [script if word == "train_search.py" else word for word in line[1].split()]
    assert script in argv
    return [*argv, *SMALL, "--epochs", "1"]


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory, scripts: Path) -> Path:
    """A folder with every script's results, ``NAME/plain`` and ``NAME/fast``, and logs."""
    folder = tmp_path_factory.mktemp("searches")
    jobs = [{"argv": documented(scripts), "log": str(folder / "documented.log")}]
    for name, (script, flags, own) in SEARCHES.items():
        for kind, backend in (("plain", "reference"), ("fast", "auto")):
            if kind == "plain" and UNMODIFIED[name] != name:
                continue
            save = folder / name / kind
            save.parent.mkdir(exist_ok=True)
            argv = ["run", *flags, "--backend", backend, str(scripts / script / "train_search.py")]
            jobs.append({"argv": [*argv, "--save", str(save), *own], "log": f"{save}.log"})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_all.py")],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for job, status in zip(jobs, json.loads(done.stdout), strict=True):
        assert status == 0, Path(str(job["log"])).read_text()
    return folder


def test_documented_command_runs(searches: Path) -> None:
    assert (searches / "search" / "result.json").is_file()


@pytest.mark.parametrize("name", SEARCHES)
def test_search_is_the_same(searches: Path, name: str) -> None:
    plain, fast = searches / UNMODIFIED[name] / "plain", searches / name / "fast"
    log = Path(f"{fast}.log").read_text()
    assert "cells of Network run on backend cpu" in log
    assert "this package's is used" in log
    assert "backend cpu" not in Path(f"{plain}.log").read_text()
    first, second = (json.loads((save / "result.json").read_text()) for save in (plain, fast))
    np.testing.assert_allclose(second["losses"], first["losses"], rtol=2e-5)
    for got, wanted in zip(second["alphas"], first["alphas"], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
    for key in first.keys() - {"losses", "alphas"}:
        assert second[key] == first[key], key
    states = [torch.load(save / "weights.pt") for save in (plain, fast)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def run_text(tmp_path: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of this text; ``flags`` are the script's own."""
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pdarts_fast", "run", "--cpu", str(script), *flags],
        text=True,
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )


SCRIPT = """
import logging, sys
import numpy as np
import torch
logging.basicConfig(stream=sys.stdout, format="log %(message)s", level=logging.INFO)
logging.info("args %s", sys.argv[1:])
import utils, genotypes, operations, model, model_search
print(utils.OWN, genotypes.PDARTS.normal[0], model.NetworkCIFAR.__name__)
print(__name__, torch.cuda.is_available(), torch.zeros(1, device="cuda").cuda(async=True).device)
x = torch.arange(6).view(2, 3).t()
print(x.contiguous().view(-1).tolist(), x.view(-1).tolist(), np.sum(i for i in range(4)))
print(torch.tensor(2.5).data[0], np.zeros(2, np.float).dtype)
raise KeyError("of the script")
"""


def test_environment_of_a_script(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("OWN = 'utils of the script'\n")
    done = run_text(tmp_path, SCRIPT, "--cpu", "-x", "3")
    assert done.stdout.splitlines() == [
        "log args ['--cpu', '-x', '3']",
        "utils of the script ('skip_connect', 0) NetworkCIFAR",
        "__main__ True cpu",
        "[0, 3, 1, 4, 2, 5] [0, 3, 1, 4, 2, 5] 6",
        "2.5 float64",
    ], done.stderr
    assert done.returncode == 1
    assert 'script.py", line 13' in done.stderr
    assert "KeyError: 'of the script'" in done.stderr
    assert "pdarts_fast/dropin" not in done.stderr.split("Traceback")[1]
    assert "stays on the CPU" in done.stderr
    assert "script.py:9: repaired async=" in done.stderr
    assert "no model_search.py: this package's is used" in done.stderr


def test_missing_script_is_one_line(tmp_path: Path) -> None:
    from pdarts_fast.cli import main

    assert main(["run", str(tmp_path / "nothing.py")]) == 2
