"""``pdarts-fast bench --predict``: what a search should take on a GPU that is not at hand.

Launches, grids and bytes are recorded from the launchers themselves, for the plans of the networks
of all three stages at batch 96 (``kernels/triton/record.py``); ``predict_model`` turns them into
seconds. Everything printed is labelled *predicted*.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pdarts_fast.bench import predict_model as model
from pdarts_fast.bench import rivals
from pdarts_fast.bench.predict_model import GPUS, Gpu, Work
from pdarts_fast.bench.predict_work import published_operators, work
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import cell as fused

STEPS, WEIGHT_EPOCHS, BOTH_EPOCHS, BATCH = 261, 10, 15, 96
STORAGE = torch.bfloat16
ASSUMPTIONS = (
    f"assumed: bfloat16 storage, batch {BATCH}, replayed from a graph at "
    f"{model.REPLAY_SECONDS * 1e6:.1f} us a launch and {model.RAMP_SECONDS * 1e6:.1f} us to fill "
    f"and drain; {model.MEMORY_SHARE:.0%} of the memory bandwidth, {model.ISSUE_SHARE:.0%} of the "
    f"instruction rate, {model.TENSOR_SHARE:.0%} of the tensor rate; the published graph in "
    f"float32, an operator at least {model.EAGER_SECONDS * 1e6:.0f} us. Not counted: stem, "
    f"classifier, optimiser, loader. Error band {model.ERROR_BAND:.0%} either way"
)


def cells(stage: int) -> list[tuple[str, tuple[int, int]]]:
    """Plan and size of input 1 of every cell of a stage's network.

    Plans differ in their place in the network, which costs nothing: all are given place 1.
    """
    found, side = [], 32
    for cell in rivals.network(stage, "reference").cells:
        fields = json.loads(fused.Names(cell).key) | {"index": 1}
        found.append((json.dumps(fields, separators=(",", ":")), (side, side)))
        side //= 2 if cell.reduction else 1
    return found


def stage_work(stage: int, want_weights: bool) -> tuple[list[Work], int]:
    """Launches of Triton kernels of one pass of a stage, and of torch operators between them."""
    from pdarts_fast.kernels.triton.record import record_cell

    works: list[Work] = []
    operators = 0
    for number, (key, size) in enumerate(cells(stage)):
        # In the alpha step nobody asks for the gradient of the stem, inputs of the first cell.
        inputs = want_weights or number > 0
        recorded = record_cell(key, BATCH, size, STORAGE, want_weights, inputs)
        works += [work(launch) for launch in (*recorded.forward, *recorded.backward)]
        operators += len(recorded.forward_operators) + len(recorded.backward_operators)
    return works, operators


def pass_seconds(works: list[Work], operators: int, gpu: Gpu) -> float:
    """Of one forward and backward pass; an operator between kernels is all overhead."""
    overhead = model.REPLAY_SECONDS + model.RAMP_SECONDS
    return sum(model.launch_seconds(one, gpu) for one in works) + operators * overhead


def by_kernel(works: list[Work], gpu: Gpu) -> dict[str, dict[str, float]]:
    """Launches, seconds without overhead, and the ratio to the roofline, by kernel."""
    rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in works:
        row = rows[one.name]
        row["launches"] += 1
        row["seconds"] += model.body_seconds(one, gpu)
        row["floor"] += max(model.memory_seconds(one, gpu), model.tensor_seconds(one, gpu))
        row["bytes"] += one.bytes
    for row in rows.values():
        row["ratio"] = row["seconds"] / row["floor"] if row["floor"] else 1.0
    return {name: dict(row) for name, row in rows.items()}


def _predict_stage(stage: int, gpu: Gpu) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": stage, "cells": rivals.CELLS[stage]}
    for name, wanted in (("weight", True), ("alpha", False)):
        works, operators = stage_work(stage, wanted)
        found[name] = {
            "kernel_launches": len(works),
            "operator_launches": operators,
            "kernels_seconds": pass_seconds(works, 0, gpu),
            "seconds": pass_seconds(works, operators, gpu),
            "kernels": by_kernel(works, gpu),
        }
    moved = published_operators(rivals.network(stage, "reference").to("meta"), BATCH)
    found["published"] = {
        "operators": len(moved),
        "seconds": sum(model.eager_seconds(one, gpu) for one in moved),
    }
    return found


def _print_stage(console: Console, gpu: Gpu, found: dict[str, Any]) -> None:
    weight = found["weight"]
    title = f"predicted for one {gpu.title}: stage {found['stage']}, weight step's pass by kernel"
    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "launches", "us", "GB/s", "of its roofline"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    rows = sorted(weight["kernels"].items(), key=lambda pair: -pair[1]["seconds"])
    for name, row in rows:
        table.add_row(
            name,
            f"{row['launches']:.0f}",
            f"{row['seconds'] * 1e6:.0f}",
            f"{row['bytes'] / max(row['seconds'], 1e-12) / 1e9:.0f}",
            f"{row['ratio']:.1f} x",
        )
    console.print(table)


def _totals(stages: list[dict[str, Any]]) -> dict[str, float]:
    def search(of: Any) -> float:
        passes = {found["stage"]: of(found) for found in stages}
        return model.search_seconds(passes, STEPS, WEIGHT_EPOCHS, BOTH_EPOCHS)

    return {
        "fused": search(lambda f: (f["weight"]["seconds"], f["alpha"]["seconds"])),
        "kernels_only": search(
            lambda f: (f["weight"]["kernels_seconds"], f["alpha"]["kernels_seconds"])
        ),
        "published": search(lambda f: (f["published"]["seconds"],) * 2),
    }


def run_predict(name: str, output: Path | None = None) -> dict[str, Any]:
    """Predicts and prints; returns all numbers.

    Args:
        name: One of ``predict_model.GPUS``.
        output: JSON file for the numbers.

    Raises:
        UsageError: No such GPU is known, or Triton is not installed.
    """
    if name not in GPUS:
        raise UsageError(f"--predict {name}: choose one of {', '.join(GPUS)}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UsageError("--predict: needs triton (pip install triton)") from error
    gpu = GPUS[name]
    console = Console(file=sys.stdout, highlight=False)
    stages = [_predict_stage(stage, gpu) for stage in (1, 2, 3)]
    for found in stages:
        _print_stage(console, gpu, found)
    table = Table(title=f"predicted passes on one {gpu.title}", title_justify="left")
    headings = (
        "stage", "kernels", "operators", "weight ms", "kernels alone", "alpha ms",
        "published ms", "ratio",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for found in stages:
        weight, published = found["weight"], found["published"]["seconds"]
        table.add_row(
            str(found["stage"]),
            str(weight["kernel_launches"]),
            str(weight["operator_launches"]),
            f"{weight['seconds'] * 1e3:.1f}",
            f"{weight['kernels_seconds'] * 1e3:.1f}",
            f"{found['alpha']['seconds'] * 1e3:.1f}",
            f"{published * 1e3:.0f}",
            f"{published / weight['seconds']:.1f} x",
        )
    console.print(table)
    totals = _totals(stages)
    console.print(
        f"predicted: a whole CIFAR-10 search (31,320 passes at batch {BATCH}) takes "
        f"{totals['fused']:.0f} s, of which the Triton kernels {totals['kernels_only']:.0f} s and "
        f"the operators between them the rest; the published graph {totals['published']:.0f} s"
    )
    console.print(ASSUMPTIONS, soft_wrap=True)
    report = {
        "predicted": True, "gpu": asdict(gpu), "assumptions": ASSUMPTIONS, "stages": stages,
        "search_seconds": totals,
    }  # fmt: skip
    if output is not None:
        output.write_text(json.dumps(report, indent=1))
    return report
