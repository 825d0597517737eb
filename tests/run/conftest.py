"""A synthetic run directory, with the files and records that a search writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast.genotype import save_genotype
from pdarts_fast.search_space import all_switches, derive, drop_ops, entropy, live_names

SEED = 20190430
STAGE_OPS = (8, 5, 3)
STAGE_CELLS = (5, 11, 17)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_run(
    folder: Path,
    *,
    epochs: int = 25,
    stop_after: int | None = None,
    classes: list[str] = CLASSES,
    name: str = "cifar10",
) -> Path:
    """Writes a run as a search of three stages would leave it.

    Args:
        folder: the run directory; made.
        epochs: of each stage.
        stop_after: number of epochs after which the search was stopped; None for a finished one.
        classes: class names of the data set.
        name: name of the data set.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    _write_config(folder, epochs, classes, name)
    limit = 3 * epochs if stop_after is None else stop_after
    metrics: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    final: list[dict[str, list[list[float]]]] = []
    switches = all_switches()
    for stage in (1, 2, 3):
        width = STAGE_OPS[stage - 1]
        pull = {kind: rng.normal(0.0, 0.05, (14, width)) for kind in switches}
        # Searches favour skips: the skip restriction has something to do.
        names = live_names(switches["normal"])
        pull["normal"] += 0.06 * np.array([[op == "skip_connect" for op in row] for row in names])
        alphas = {kind: 1e-3 * rng.normal(size=(14, width)) for kind in switches}
        for epoch in range(epochs):
            if len(lines) == limit:
                break
            frozen = epoch < epochs * 0.4
            for kind in switches:
                if not frozen:
                    alphas[kind] = alphas[kind] + pull[kind] + 0.01 * rng.normal(size=(14, width))
            lines.append(
                {"stage": stage, "epoch": epoch}
                | {"ops": {kind: live_names(table) for kind, table in switches.items()}}
                | {kind: np.round(alphas[kind], 6).tolist() for kind in switches}
            )
            metrics += _epoch_records(stage, epoch, epochs, frozen, alphas, rng)
        else:
            metrics.append(_stage_record(stage, epochs, metrics))
            final.append({kind: lines[-1][kind] for kind in switches})
            if stage < 3:
                switches = drop_ops(switches, final[-1], width - STAGE_OPS[stage])
            continue
        break
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "alphas.jsonl", lines)
    if len(final) == 3:
        _write_result(folder / "genotype.json", final)
    return folder


def _write_result(path: Path, alphas: list[dict[str, list[list[float]]]]) -> None:
    derived = derive(alphas)
    save_genotype(
        path,
        derived.restricted[2],
        max_skips=2,
        unrestricted=derived.genotype,
        restricted=derived.restricted,
    )


def _write_config(folder: Path, epochs: int, classes: list[str], name: str) -> None:
    config = {
        "preset": "cifar10", "dataset": name, "cells": list(STAGE_CELLS),
        "ops_kept": list(STAGE_OPS), "channels": [16, 16, 16], "skip_dropout": [0.0, 0.4, 0.7],
        "max_skips": 2, "epochs": epochs, "batch_size": 96, "lr": 0.025, "amp": False,
        "run_dir": str(folder), "data": None,
    }  # fmt: skip
    content = {
        "config": config,
        "command": "pdarts-fast search --dataset cifar10 --data data --seed 3",
        "versions": {"pdarts_fast": "0.1.0", "python": "3.11.2", "torch": "2.9.0"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "hardware": {
            "cpu": "Example 9000 16-Core Processor", "cores": 16, "memory_gib": 62.7,
            "gpu": "Example GPU 80GB", "backend": "triton",
        },
        "created": "2026-01-02T03:04:05+00:00",
        "dataset": {
            "name": name, "num_classes": len(classes), "classes": classes,
            "train_images": 50000, "test_images": 10000, "image_size": 32,
            "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=2))


def _epoch_records(
    stage: int,
    epoch: int,
    epochs: int,
    frozen: bool,
    alphas: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    share = (epoch + 1) / epochs
    loss = 2.3 * np.exp(-1.4 * share) + 0.02 * rng.normal()
    place = {"stage": stage, "epoch": epoch, "step": 261 * ((stage - 1) * epochs + epoch + 1)}
    records = [
        {"kind": "interval", **place, "loss": loss, "lr": 0.02},
        {
            "kind": "epoch", **place,
            "train_loss": loss,
            "train_accuracy": 1 - loss / 2.6,
            "alpha_loss": None if frozen else loss + 0.15,
            "alpha_accuracy": None if frozen else 0.94 - loss / 2.6,
            "lr": 0.0125 * (1 + np.cos(np.pi * epoch / epochs)),
            "dropout": [0.0, 0.4, 0.7][stage - 1] * (1 - share if frozen else np.exp(-3 * share)),
            "entropy_normal": entropy(alphas["normal"]),
            "entropy_reduce": entropy(alphas["reduce"]),
            "images_per_second": 900.0 / stage + 5 * rng.normal(),
            "seconds": 28.0 * stage * (1 if frozen else 2),
            "peak_memory_mib": 4000.0 * stage,
        },
    ]  # fmt: skip
    if epoch >= epochs - 4:
        accuracy = 0.9 - loss / 2.6
        validation = {"loss": loss + 0.2, "accuracy": accuracy, "images": 25000, "seconds": 6.0}
        records.append({"kind": "validation", **place, **validation})
    return records


def _stage_record(stage: int, epochs: int, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(r["seconds"] for r in metrics if r["kind"] == "epoch" and r["stage"] == stage)
    return {
        "kind": "stage", "stage": stage, "epoch": epochs - 1, "step": 261 * stage * epochs,
        "cells": STAGE_CELLS[stage - 1], "ops": STAGE_OPS[stage - 1], "channels": 16,
        "epochs": epochs, "parameters": 1_200_000 * stage, "seconds": seconds + 9.0,
        "dropped": [3, 2, 2][stage - 1],
    }  # fmt: skip


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes synthetic run directories; keyword arguments as in `write_run`."""
    made = 0

    def make(**options: Any) -> Path:
        nonlocal made
        made += 1
        return write_run(tmp_path / f"run-{made}", **options)

    return make
