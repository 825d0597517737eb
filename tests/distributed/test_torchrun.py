"""What only torchrun itself can show: starting, restarting, and checks of two ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHECKS = Path(__file__).parent / "checks.py"


def torchrun(*arguments: Any, cwd: Path, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts torchrun with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def _checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distributed_checks", CHECKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What both ranks have to complain of a check."""
    folder = tmp_path_factory.mktemp("checks")
    torchrun(CHECKS, folder, cwd=folder).communicate()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return lambda name: [rank.get(name, "not run: an earlier check failed") for rank in found]


@pytest.mark.parametrize("name", list(_checks().CHECKS))
def test_two_ranks(name: str, checked: Callable[[str], list[str]]) -> None:
    complaints = checked(name)
    assert complaints == ["", ""], "\n".join(complaints)


def pid_of_rank(rank: int, run: Path) -> int:
    """The process of a rank that works on a run directory."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, PermissionError):
            continue
        if str(run).encode() in words and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process is rank {rank} of {run}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find a rank")
def test_a_killed_rank_restarts_from_the_checkpoint(
    run_ranks: Callable[..., list[Any]], tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    flags = [
        "--cells", 3, "--ops-kept", 8, "--skip-dropout", 0.4, "--epochs", 3, "--batch-size", 4,
        "--checkpoint-interval", 1, "--max-skips", 8,
    ]  # fmt: skip
    whole = tmp_path / "whole"
    for process in run_ranks(tiny(whole, *flags), toy=False):
        assert process.status == 0, process.stderr
    log, run = tmp_path / "log", tmp_path / "killed"
    with log.open("w") as stderr:
        command = ["-m", "pdarts_fast", *tiny(run, *flags)]
        process = torchrun("--max-restarts=1", *command, cwd=tmp_path, stderr=stderr)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                break
            time.sleep(0.01)
        os.kill(pid_of_rank(1, run), signal.SIGKILL)
        out, _ = process.communicate()
    assert process.returncode == 0, log.read_text()
    assert log.read_text().count(f"goes on in {run} after") == 1, log.read_text()
    assert out.count("genotype (at most") == 1
    assert outcome(run) == outcome(whole)
