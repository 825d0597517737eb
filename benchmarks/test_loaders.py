"""Images per second of the loaders, rivals in turns: images in memory, and image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pdarts_fast.bench.measure import interleaved
from pdarts_fast.data import Augmentation, ImageData, Loader
from pdarts_fast.data.choose import array_loader, file_loader
from pdarts_fast.data.dali_pipeline import missing
from pdarts_fast.data.files import MEAN, STD, find_images
from pdarts_fast.data.views import StreamAugmentation

REPEATS = 3
CIFAR = {"images": 9600, "batch_size": 96}
FILES = {"images": 192, "batch_size": 32, "side": 224}
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"
        ),
    ),
]


def consume(loader: Loader) -> Callable[[], Tensor]:
    """Passes over an epoch; each batch is copied into a step's input, as training does."""
    state = {"epoch": 0}
    target: dict[torch.Size, Tensor] = {}

    def run() -> Tensor:
        filled = torch.empty(0)
        for images, _ in loader.epoch(state["epoch"]):
            if images.shape not in target:
                target[images.shape] = torch.empty_like(images)
            filled = target[images.shape].copy_(images)
        state["epoch"] += 1
        if filled.is_cuda:
            torch.cuda.synchronize(filled.device)
        return filled

    return run


def compare(
    benchmark: Any, machine: dict[str, Any], loaders: dict[str, Loader], subject: str
) -> None:
    """Times all rivals in turns and records each; the benchmark's own time is the subject's."""
    rivals = {name: consume(loader) for name, loader in loaders.items()}
    times = interleaved(rivals, REPEATS)
    images = loaders[subject].num_images
    benchmark.extra_info.update(machine)
    fastest = min(timing.best for timing in times.values())
    for name, timing in times.items():
        benchmark.extra_info[name] = {
            "images_per_second": images / timing.best,
            "images_per_second_median": images / timing.median,
            "of_the_fastest": fastest / timing.best,
        }
    benchmark.pedantic(rivals[subject], rounds=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cutout", [0, 16], ids=["search", "train"])
def test_images_in_memory(
    benchmark: Any, machine: dict[str, Any], cutout: int, device: str
) -> None:
    """CIFAR's shapes and augmentation."""
    count = CIFAR["images"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageData("random", pixels, torch.arange(count) % 10, tuple("0123456789"))

    def make(name: str, workers: int) -> Loader:
        return array_loader(
            name, data, device=torch.device(device), workers=workers,
            batch_size=CIFAR["batch_size"], augmentation=Augmentation(cutout=cutout),
            mean=MEAN, std=STD, seed=0, stream="benchmark", shuffle=True,
        )  # fmt: skip

    loaders = {"resident": make("resident", 0)}
    for workers in (0, 2):
        loaders[f"torchvision, {workers} workers"] = make("torchvision", workers)
    if missing() is None:
        for threads in (1, 2):
            loaders[f"dali, {threads} threads"] = make("dali", threads)
    compare(benchmark, machine, loaders, "resident")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of the size and compression of ImageNet's: 500×375, about 110 kB."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[0:375, 0:500]
    for number in range(FILES["images"]):
        waves = [127 + 90 * np.sin(x / rng.uniform(9, 90) + y / rng.uniform(9, 90)) for _ in "rgb"]
        pixels = np.stack(waves, -1) + rng.normal(0, 9, (375, 500, 3))
        place = folder / "train" / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(place, quality=90)
    for name in "ab":
        (folder / "val" / name).mkdir(parents=True)
        first = sorted((folder / "train" / name).iterdir())[0]
        (folder / "val" / name / first.name).write_bytes(first.read_bytes())
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "evaluate"])
def test_image_files(
    benchmark: Any, machine: dict[str, Any], photographs: Path, training: bool, device: str
) -> None:
    """ImageNet's shapes and augmentation: random resized crop, flip, colours; or the centre."""
    listing = find_images(photographs).train

    def make(name: str, workers: int) -> Loader:
        return file_loader(
            name, listing, device=torch.device(device), workers=workers,
            batch_size=FILES["batch_size"], image_size=FILES["side"],
            augmentation=StreamAugmentation() if training else None,
            seed=0, stream="benchmark", shuffle=True,
        )  # fmt: skip

    loaders = {f"torchvision, {n} workers": make("torchvision", n) for n in (0, 1, 2)}
    if missing() is None:
        loaders |= {f"dali, {n} threads": make("dali", n) for n in (1, 2)}
    compare(benchmark, machine, loaders, "torchvision, 2 workers")
