"""Sweeps without the searches: folders as runs would leave them, and a stand-in for a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast.genotype import save_genotype
from pdarts_fast.search_space import all_switches, derive, drop_ops
from pdarts_fast.sweep.directory import Outcome, SweepDirectory
from pdarts_fast.sweep.plan import Plan, PlannedRun, make_plan

STAGE_OPS = (8, 5, 3)


def random_alphas(seed: int, bias: float = 2.0) -> list[dict[str, np.ndarray]]:
    """Alphas of three stages; `bias` pulls all seeds to the same operations."""
    rng = np.random.default_rng(seed)
    pull = {k: np.random.default_rng(99).normal(size=(14, 8)) for k in ("normal", "reduce")}
    switches, stages = all_switches(), []
    for number, width in enumerate(STAGE_OPS):
        alphas = {
            kind: rng.normal(size=(14, width)) + bias * pull[kind][table].reshape(14, width)
            for kind, table in switches.items()
        }
        stages.append(alphas)
        if number < 2:
            switches = drop_ops(switches, alphas, width - STAGE_OPS[number + 1])
    return stages


def write_run(folder: Path, run: PlannedRun, *, accuracy: float, finished: bool = True) -> None:
    """Write what a search leaves that the page reads, and a training if it is asked for."""
    folder.mkdir(parents=True)
    dataset = {
        "name": run.settings["dataset"], "num_classes": 10, "train_images": 1437, "image_size": 16,
    }  # fmt: skip
    hardware = {"cpu": "Example 9000", "cores": 16, "memory_gib": 62.7, "backend": "cpu"}
    info = {
        "kind": "search", "config": run.settings, "command": "pdarts-fast search",
        "created": "2026-01-02T03:04:05+00:00", "dataset": dataset, "hardware": hardware,
        "versions": {"pdarts_fast": "0.1.0"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(info))
    lines: list[dict[str, Any]] = []
    for stage in (1, 2, 3) if finished else (1,):
        place = {"stage": stage, "epoch": 3, "step": 92 * stage}
        measured = accuracy - 0.02 * (3 - stage)
        lines.append({"kind": "epoch", **place, "train_loss": 0.5, "seconds": 20.0 * stage})
        lines.append({"kind": "validation", **place, "loss": 0.4, "accuracy": measured})
        lines.append({"kind": "stage", **place, "cells": 3, "ops": 8, "seconds": 21.0 * stage})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return
    derived = derive(random_alphas(run.seed))
    save_genotype(
        folder / "genotype.json", derived.restricted[2], max_skips=2,
        unrestricted=derived.genotype, restricted=derived.restricted,
    )  # fmt: skip
    (folder / "report.html").write_text("<p>report")
    if run.settings["then_train"]:
        write_training(folder / "train", accuracy + 0.04)


def write_training(folder: Path, accuracy: float) -> None:
    """Write what a training of two epochs leaves: its best epoch comes first."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "train", "config": {"epochs": 2}}))
    lines: list[dict[str, Any]] = []
    for epoch, value in enumerate((accuracy + 0.01, accuracy)):
        lines.append({"kind": "epoch", "epoch": epoch, "train_loss": 0.3, "seconds": 50.0})
        lines.append({"kind": "validation", "epoch": epoch, "accuracy": value, "seconds": 5.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(
    path: Path,
    *,
    seeds: int = 3,
    vary: Sequence[str] = (),
    flags: Sequence[str] = ("--preset", "demo"),
    failed: Sequence[int] = (),
    unfinished: Sequence[int] = (),
    waiting: Sequence[int] = (),
) -> Plan:
    """Write a sweep as one that has ended, or not, would leave it.

    Args:
        path: Its folder.
        seeds: As in `make_plan`; likewise `vary` and `flags`.
        failed: Numbers of runs that failed.
        unfinished: Numbers of runs that were killed in their second stage.
        waiting: Numbers of runs that have not begun.
    """
    plan = make_plan(seeds, vary, flags)
    folder = SweepDirectory(path)
    folder.open()
    folder.write_plan(plan, "pdarts-fast sweep --preset demo --seeds 3")
    rng = np.random.default_rng(5)
    for number, run in enumerate(plan.runs):
        accuracy = float(0.9 + 0.03 * rng.random())
        if number in waiting:
            continue
        ended = number not in unfinished and number not in failed
        write_run(folder.run_dir(run), run, accuracy=accuracy, finished=ended)
        folder.log(run).write_text("stage 1/3\nloss is nan\n")
        if number in failed:
            folder.write_outcome(run, Outcome("failed", 1, "exit status 1: loss <is> not finite"))
        elif ended:
            folder.write_outcome(run, Outcome("finished", 0))
    folder.close()
    return plan


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., tuple[Path, Plan]]:
    """Makes folders of sweeps; keyword arguments as in `write_sweep`."""
    made = 0

    def make(**options: Any) -> tuple[Path, Plan]:
        nonlocal made
        made += 1
        path = tmp_path / f"sweep-{made}"
        return path, write_sweep(path, **options)

    return make


STAND_IN = """
import json, os, pathlib, signal, sys, threading, time

def stop_at_end_of_input():
    while os.read(0, 64):
        pass
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop_at_end_of_input, daemon=True).start()
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--run-dir") + 1])
run.mkdir(parents=True, exist_ok=True)
behaviour = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
begun = time.time()
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
print("begins", flush=True)
attempt = len(list(run.glob("attempt-*")))
raylet = os.environ.get("RAY_RAYLET_PID")
call = {"words": words, "gpu": gpu, "pid": os.getpid(), "raylet": raylet}
(run / f"attempt-{attempt}").write_text(json.dumps(call))
what = behaviour.get(run.name, behaviour.get("all", []))
if attempt < len(what):
    step = what[attempt]
    if step == "sleep":
        time.sleep(60)
    if step == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == "fail":
        print("pdarts-fast: error: the loss is not finite", flush=True)
        sys.exit(1)
deadline = time.time() + 60
while len(list(run.parent.glob("*/attempt-*"))) < behaviour.get("meet", 0):
    if time.time() > deadline:
        sys.exit("nobody came")
    time.sleep(0.02)
(run / "times").write_text(json.dumps([begun, time.time()]))
"""


class StandIn:
    """A quick program in the place of a run; it notes how it was called.

    Args:
        folder: Where it is put.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stand_in.py"
        self.path.write_text(STAND_IN)
        self.program = (sys.executable, str(self.path))
        self.behave()

    def behave(self, **what: Any) -> None:
        """Say what runs do, attempt by attempt: ``{run name: ["fail", "sleep", "die"]}``.

        Args:
            what: Name of a run, or ``all``, to its attempts; ``meet``: how many runs have to have
                begun before one ends.
        """
        self.path.with_suffix(".json").write_text(json.dumps(what))

    def attempts(self, run_dir: Path) -> list[dict[str, Any]]:
        """The calls for a run: its ``words``, ``gpu``, ``pid`` and ``raylet``, its node of Ray."""
        return [json.loads(file.read_text()) for file in sorted(run_dir.glob("attempt-*"))]

    @staticmethod
    def alive(pid: int) -> bool:
        """Whether a process runs; one that has ended and waits for its parent does not."""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state not in "ZX"


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)
