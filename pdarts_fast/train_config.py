"""Configuration of a training run: every number of the recipes, presets, checks. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pdarts_fast.errors import UsageError
from pdarts_fast.settings import (
    LOADERS,
    Settings,
    check_choices,
    check_device,
    check_ranges,
    check_run_flags,
)
from pdarts_fast.settings import LoaderName as LoaderName

PresetName = Literal["cifar10", "cifar100", "imagenet", "imagenet-256", "demo"]
DatasetName = Literal["digits", "cifar10", "cifar100", "image-folder", "imagenet"]
NetworkName = Literal["cifar", "imagenet"]
BackendName = Literal["auto", "reference", "cpu", "triton"]

# Data sets that are folders of image files.
FOLDERS = ("image-folder", "imagenet")

# Larger batches start with a warm-up of the learning rate. Source: arXiv 1904.12760, section 4.3.
WARMUP_BATCH_SIZE = 256
# Sides of the images that the auxiliary head is made for: features of 8×8 and of 7×7.
AUXILIARY_IMAGE_SIZE = {"cifar": 32, "imagenet": 224}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Train the network of a searched cell.

    The defaults are the paper's CIFAR-10 recipe (arXiv 1904.12760, section 4.2). A flag given on
    the command line wins over --config, which wins over --preset.
    """

    command: ClassVar[str] = "train"
    execution_fields: ClassVar[frozenset[str]] = frozenset(
        [
            "preset",
            "config",
            "genotype",
            "data",
            "download",
            "checksum",
            "run_dir",
            "resume",
            "overwrite",
            "backend",
            "device",
            "cuda_graphs",
            "threads",
            "workers",
            "log_interval",
            "checkpoint_interval",
            "tensorboard",
        ]
    )

    genotype: str | None = None
    """The cell: a name (PDARTS, DARTS_V2, ...), a genotype file, or the folder of a search."""
    preset: PresetName = "cifar10"
    """Starting point of all other values; demo takes minutes on bundled images."""
    config: Path | None = None
    """JSON file of flag values, or the config.json of an earlier training."""

    dataset: DatasetName = "cifar10"
    """Images to train on; imagenet is a folder with train/CLASS/ and val/CLASS/."""
    data: Path | None = None
    """Folder that holds the data set (not needed for digits)."""
    loader: LoaderName = "auto"
    """How batches are made: dali, resident or torchvision; auto: DALI on CUDA, the fastest on the
    CPU. With dali and torchvision an image-folder is read file by file as it is needed, with
    random resized crop and colour jitter; with auto and resident it is decoded once into memory,
    padded and cropped. With resident so is imagenet."""
    download: bool = False
    """Download CIFAR into --data if it is not there."""
    checksum: bool = True
    """Verify the MD5 of CIFAR files."""
    image_size: int = 32
    """Side in pixels of the images that the network sees."""
    skip_broken: bool = False
    """Leave out image files that cannot be decoded instead of stopping."""

    run_dir: Path | None = None
    """Output folder (default: runs/train-<dataset>-<seed>-<time>)."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir."""
    overwrite: bool = False
    """Replace what an earlier run wrote in --run-dir."""
    seed: int = 0
    """Seed of weights, data order, augmentation and drop-path."""
    backend: BackendName = "auto"
    """How cells run; auto takes kernels where they are faster, reference torch's modules."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision: bfloat16 activations (float16 with a loss scale on GPUs before Ampere),
    float32 weights and statistics."""
    cuda_graphs: bool = True
    """On a GPU, replay steps from CUDA graphs."""
    channels_last: bool = False
    """Keep activations in channels-last memory order (faster on recent GPUs)."""
    threads: int | None = None
    """CPU threads (default: as many as torch chooses)."""
    workers: int = 2
    """Threads, or processes of the torchvision loader, that decode and augment images."""

    network: NetworkName = "cifar"
    """Stem and auxiliary head: cifar for small images, imagenet for 224×224."""
    cells: int = 20
    """Cells of the network; those at a third and two thirds are reductions."""
    channels: int = 36
    """Channels of the first cell's nodes."""
    auxiliary: bool = True
    """Train a second classifier at two thirds of the depth (wants images of 32 or 224)."""
    auxiliary_weight: float = 0.4
    """Weight of its loss."""
    drop_path: float = 0.3
    """Drop-path probability that is reached linearly, from 0, at the end of training."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""

    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step; the last batch of an epoch may be smaller."""
    lr: float = 0.025
    """Initial learning rate (SGD)."""
    lr_min: float = 0.0
    """Learning rate at the end of the cosine."""
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    """linear: to 0, the last 5 epochs at a fifth of the slope."""
    warmup_epochs: int = 0
    """First epochs with a growing learning rate, if --batch-size is above 256."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 3e-4
    """Weight decay."""
    grad_clip: float = 5.0
    """Largest gradient norm."""

    crop_padding: int = 4
    """Images in memory: zero pixels added on each side before the random crop (0: no crop)."""
    flip: bool = True
    """Flip half of the training images horizontally."""
    cutout: int = 16
    """Images in memory: side in pixels of the hole cut into training images (0: none)."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    """Images read from files: jitter of brightness, contrast, saturation and hue."""

    validation_interval: int = 1
    """Epochs between two evaluations on the test images; the last epoch always has one."""
    log_interval: int = 50
    """Steps between two log lines and metrics records."""
    checkpoint_interval: int = 500
    """Steps between two checkpoints inside an epoch (0: only at its end)."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `tensorboard`)."""

    @property
    def widest_cell(self) -> int:
        """C of the widest cell: both reductions double it."""
        return 4 * self.channels

    @property
    def streams(self) -> bool:
        """Whether images are read from files as they are needed."""
        if self.loader == "auto":
            return self.dataset == "imagenet"
        return self.dataset in FOLDERS and self.loader != "resident"


_IMAGENET: dict[str, Any] = {
    "dataset": "imagenet",
    "image_size": 224,
    "network": "imagenet",
    "cells": 14,
    "channels": 48,
    "drop_path": 0.0,
    "label_smoothing": 0.1,
    "epochs": 250,
    "batch_size": 1024,
    "lr": 0.5,
    "lr_schedule": "linear",
    "warmup_epochs": 5,
    "weight_decay": 3e-5,
    "cutout": 0,
    "workers": 8,
}

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {"dataset": "cifar100"},
    # The paper's eight GPUs, and the same recipe scaled to what one GPU holds.
    "imagenet": _IMAGENET,
    "imagenet-256": {**_IMAGENET, "batch_size": 256, "lr": 0.1},
    "demo": {
        "dataset": "digits",
        "image_size": 16,
        "cells": 5,
        "channels": 12,
        "auxiliary": False,
        "drop_path": 0.1,
        "epochs": 15,
        "batch_size": 64,
        "crop_padding": 2,
        "flip": False,
        "cutout": 0,
        "log_interval": 10,
    },
}


def preset(name: str) -> TrainConfig:
    """The configuration of a preset.

    Raises:
        UsageError: `name` is not one of the presets.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset: {name!r} is not one of {', '.join(PRESETS)}")
    return dataclasses.replace(TrainConfig(), preset=name, **PRESETS[name])  # type: ignore[arg-type]


_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "dataset": ("digits", "cifar10", "cifar100", "image-folder", "imagenet"),
    "loader": LOADERS,
    "network": ("cifar", "imagenet"),
    "backend": ("auto", "reference", "cpu", "triton"),
    "lr_schedule": ("cosine", "linear"),
}

# Field -> (smallest, largest) allowed value; the bounds belong to the range.
_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (8, 1024),
    "seed": (0, 2**32 - 1),
    "threads": (1, 4096),
    "workers": (0, 1024),
    "cells": (3, 1000),
    "channels": (2, 4096),
    "auxiliary_weight": (0.0, 100.0),
    "drop_path": (0.0, 0.99),
    "label_smoothing": (0.0, 0.99),
    "epochs": (1, 100_000),
    "batch_size": (2, 1_000_000),
    "lr": (1e-12, 100.0),
    "lr_min": (0.0, 100.0),
    "warmup_epochs": (0, 100_000),
    "momentum": (0.0, 0.999999),
    "weight_decay": (0.0, 1.0),
    "grad_clip": (1e-6, 1e9),
    "crop_padding": (0, 512),
    "cutout": (0, 1024),
    "jitter": (0.0, 1.0),
    "validation_interval": (1, 100_000),
    "log_interval": (1, 10**9),
    "checkpoint_interval": (0, 10**9),
}


def validate(config: TrainConfig) -> TrainConfig:
    """`config` after all checks.

    Raises:
        UsageError: A value makes no sense or does not go with another; names the flag.
    """
    check_choices(config, _CHOICES)
    check_device(config.device)
    check_ranges(config, _RANGES)
    check_run_flags(config.run_dir, config.resume, config.overwrite, "training")
    if config.genotype is None:
        raise UsageError(
            "--genotype is missing: give the name of a cell (PDARTS), a genotype file, or the "
            "folder of a search"
        )
    if config.lr_min > config.lr:
        raise UsageError(f"--lr-min {config.lr_min} is larger than --lr {config.lr}")
    if config.lr_min and config.lr_schedule == "linear":
        raise UsageError(
            f"--lr-min {config.lr_min} goes with --lr-schedule cosine; linear ends at 0"
        )
    if config.warmup_epochs > config.epochs and config.batch_size > WARMUP_BATCH_SIZE:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs} is more than --epochs {config.epochs}"
        )
    check_data(config)
    side = AUXILIARY_IMAGE_SIZE[config.network]
    if config.auxiliary and config.image_size != side:
        raise UsageError(
            f"--auxiliary wants --image-size {side} for --network {config.network}, got "
            f"{config.image_size}: give that size or --no-auxiliary"
        )
    return config


def check_data(config: TrainConfig) -> None:
    """Raise `UsageError` if the flags about the data do not go together."""
    if config.dataset != "digits" and config.data is None:
        raise UsageError(
            f"--dataset {config.dataset} needs --data DIR, the folder of its files; "
            "--preset demo runs on bundled images"
        )
    if config.download and config.dataset not in ("cifar10", "cifar100"):
        raise UsageError(f"--download works for cifar10 and cifar100, not for {config.dataset}")
    if config.jitter[3] > 0.5:
        raise UsageError(f"--jitter: the hue varies by at most 0.5, got {config.jitter[3]}")
    if not config.streams and config.cutout >= config.image_size:
        raise UsageError(
            f"--cutout {config.cutout} would erase whole images of --image-size {config.image_size}"
        )
