"""Recipes of the paper as presets, and what the settings of a training refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.errors import UsageError
from pdarts_fast.settings import differing, from_json, to_json
from pdarts_fast.train_config import PRESETS, TrainConfig, preset, validate

CIFAR = {
    "network": "cifar", "cells": 20, "channels": 36, "epochs": 600, "batch_size": 128,
    "lr": 0.025, "lr_min": 0.0, "momentum": 0.9, "weight_decay": 3e-4, "lr_schedule": "cosine",
    "grad_clip": 5.0, "cutout": 16, "crop_padding": 4, "flip": True, "drop_path": 0.3,
    "auxiliary": True, "auxiliary_weight": 0.4, "label_smoothing": 0.0, "warmup_epochs": 0,
    "image_size": 32, "streams": False,
}  # fmt: skip
IMAGENET = {
    "network": "imagenet", "cells": 14, "channels": 48, "epochs": 250, "batch_size": 1024,
    "lr": 0.5, "momentum": 0.9, "weight_decay": 3e-5, "lr_schedule": "linear", "grad_clip": 5.0,
    "cutout": 0, "flip": True, "jitter": (0.4, 0.4, 0.4, 0.2), "drop_path": 0.0,
    "auxiliary": True, "auxiliary_weight": 0.4, "label_smoothing": 0.1, "warmup_epochs": 5,
    "image_size": 224, "streams": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cifar10", CIFAR | {"dataset": "cifar10"}),
        ("cifar100", CIFAR | {"dataset": "cifar100"}),
        ("imagenet", IMAGENET | {"dataset": "imagenet"}),
        ("imagenet-256", IMAGENET | {"dataset": "imagenet", "batch_size": 256, "lr": 0.1}),
    ],
    ids=["cifar10", "cifar100", "imagenet", "imagenet-256"],
)
def test_presets_are_the_recipes_of_the_paper(name: str, recipe: dict[str, Any]) -> None:
    config = preset(name)
    assert {key: getattr(config, key) for key in recipe} == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    config = dataclasses.replace(preset(name), genotype="PDARTS", data=Path("data"))
    assert validate(config) == config
    assert config.preset == name


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str) -> None:
    config = dataclasses.replace(preset(name), data=Path("a"), threads=3, genotype="PDARTS")
    assert from_json(to_json(config), TrainConfig(), "file") == config


def test_only_settings_that_change_the_result_differ() -> None:
    config = preset("demo")
    assert differing(to_json(config), config) == []
    moved = dataclasses.replace(config, data=Path("elsewhere"), workers=7, threads=1, resume=True)
    assert differing(to_json(config), moved) == []
    changed = dataclasses.replace(config, epochs=9, jitter=(0.0, 0.0, 0.0, 0.0))
    assert differing(to_json(config), changed) == [
        "--epochs (15, now 9)",
        "--jitter ([0.4, 0.4, 0.4, 0.2], now [0.0, 0.0, 0.0, 0.0])",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genotype": None}, "--genotype is missing"),
        ({"dataset": "mnist"}, "--dataset: 'mnist' is not one of digits"),
        ({"device": "gpu"}, "--device: 'gpu' is not auto, cpu, cuda"),
        ({"drop_path": 1.0}, "--drop-path 1.0: wanted a value from 0 to 0.99"),
        ({"lr": float("nan")}, "--lr nan: wanted a value"),
        ({"cells": 2}, "--cells 2: wanted a value from 3"),
        ({"epochs": 0}, "--epochs 0: wanted a value from 1"),
        ({"lr_min": 0.1}, "--lr-min 0.1 is larger than --lr 0.025"),
        ({"lr_min": 0.01, "lr_schedule": "linear"}, "goes with --lr-schedule cosine"),
        (
            {"warmup_epochs": 601, "batch_size": 512},
            "--warmup-epochs 601 is more than --epochs 600",
        ),
        ({"data": None}, "--dataset cifar10 needs --data DIR"),
        ({"dataset": "digits", "download": True}, "--download works for cifar10"),
        ({"loader": "numpy"}, "--loader: 'numpy' is not one of auto, dali, resident, torchvision"),
        (
            {"image_size": 16, "cutout": 8},
            "--auxiliary wants --image-size 32 for --network cifar",
        ),
        ({"network": "imagenet"}, "--auxiliary wants --image-size 224"),
        ({"cutout": 32}, "--cutout 32 would erase whole images"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "--jitter: the hue varies by at most 0.5, got 0.6"),
        ({"resume": True}, "--resume needs --run-dir DIR, the folder of the training"),
        (
            {"resume": True, "overwrite": True, "run_dir": Path("x")},
            "--resume and --overwrite exclude each other",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(TrainConfig(), genotype="PDARTS", data=Path("data"))
    with pytest.raises(UsageError) as caught:
        validate(dataclasses.replace(config, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_settings_and_presets_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown setting 'max-skips'; pdarts-fast train --help"):
        from_json({"max-skips": 2}, TrainConfig(), "file")
    with pytest.raises(UsageError, match="--preset: 'x' is not one of cifar10, cifar100"):
        preset("x")


@pytest.mark.parametrize(
    ("dataset", "loader", "streams"),
    [
        ("cifar10", "auto", False),
        ("cifar10", "dali", False),
        ("cifar10", "torchvision", False),
        ("image-folder", "auto", False),
        ("image-folder", "resident", False),
        ("image-folder", "dali", True),
        ("image-folder", "torchvision", True),
        ("imagenet", "auto", True),
        ("imagenet", "dali", True),
        ("imagenet", "resident", False),
    ],
)
def test_every_loader_serves_every_data_set(dataset: str, loader: str, streams: bool) -> None:
    config = dataclasses.replace(
        TrainConfig(), genotype="PDARTS", data=Path("data"), dataset=dataset, loader=loader,
        skip_broken=True,
    )  # fmt: skip
    assert validate(config).streams == streams
