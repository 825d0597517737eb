"""A sweep of real searches from the command line: killed with its runs, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pdarts_fast.cli import main

TINY = (
    "--dataset image-folder --image-size 8 --channels 1 --cells 3 --ops-kept 8 --skip-dropout 0 "
    "--epochs 2 --warmup-epochs 1 --batch-size 8 --threads 1 --device cpu --checkpoint-interval 1"
)


def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(
    outcome: Any, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "sweep"
    flags = [*TINY.split(), "--data", str(images)]
    words = ["sweep", *flags, "--seeds", "2", "--sweep-dir", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pdarts_fast", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(path.glob("runs/*/checkpoints/*.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    assert main(["sweep", "--resume", "--sweep-dir", str(path)]) == 0
    assert "goes on in" in (path / "logs" / "seed0.log").read_text()
    whole = tmp_path / "whole"
    assert main(["search", *flags, "--run-dir", str(whole)]) == 0
    assert outcome(path / "runs" / "seed0") == outcome(whole)

    summary = json.loads((path / "sweep.json").read_text())
    assert [run["status"] for run in summary["runs"]] == ["finished", "finished"]
    assert all(0 <= run["validation_accuracy"] <= 1 for run in summary["runs"])
    assert summary["settings"][0]["agreement"]["normal"] is not None
    assert (path / "runs" / "seed0" / "report.html").is_file()
    # Nothing is left to do: at once, and with the same answer.
    before = (path / "runs" / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert main(["sweep", "--resume", "--sweep-dir", str(path)]) == 0
    assert (path / "runs" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == before
