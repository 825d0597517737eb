"""Configuration of a search: every number of the method, presets, checks. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from pdarts_fast.errors import UsageError
from pdarts_fast.settings import (
    LOADERS,
    LoaderName,
    Settings,
    check_choices,
    check_device,
    check_ranges,
    check_run_flags,
    flag,
)
from pdarts_fast.settings import differing as differing
from pdarts_fast.settings import to_json as to_json
from pdarts_fast.strategies.rules import STRATEGIES, STRATEGY_PRESETS, check_strategy

DatasetName = Literal["digits", "cifar10", "cifar100", "image-folder"]
BackendName = Literal["auto", "reference", "cpu", "triton"]
StrategyName = Literal["pdarts", "opp", "rapdarts"]


# Values of a run that do not change its result: --resume may give other ones.
EXECUTION_FIELDS = frozenset(
    [
        "preset",
        "config",
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
        "loader",
        "workers",
        "log_interval",
        "checkpoint_interval",
        "tensorboard",
        "then_train",
    ]
)


@dataclass(frozen=True)
class SearchConfig(Settings):
    """Search a cell by P-DARTS: three stages of growing depth and shrinking op sets.

    The defaults are the paper's CIFAR-10 search (arXiv 1904.12760, section 4.2); --strategy opp
    and --strategy rapdarts bring presets of their own. A flag given on the command line wins over
    --config, which wins over --preset.
    """

    command: ClassVar[str] = "search"
    execution_fields: ClassVar[frozenset[str]] = EXECUTION_FIELDS

    preset: Literal["cifar10", "cifar100", "demo"] = "cifar10"
    """Starting point of all other values; demo is a minutes-long search on bundled images."""
    config: Path | None = None
    """JSON file of flag values, or the config.json of an earlier run."""

    strategy: StrategyName = "pdarts"
    """pdarts; opp: one stage, operations are added one by one; rapdarts: pdarts with --target."""
    target: tuple[str, ...] = ()
    """Most that the derived cell may cost: params=3.0M, macs=500M, memory=40MB (activations of an
    image), latency=12ms (on this device). Several at once, or the flag several times."""
    target_weight: tuple[float, ...] = (1.0,)
    """Weight of each target's cost in the alpha loss."""
    beta_decay: float = 0.0
    """Weight of the mean logsumexp of the alphas of an edge in the alpha loss, reached linearly
    over the alpha epochs of a stage (0: none; published: 50 after 100 epochs)."""
    sample: Literal["softmax", "dirichlet"] = "softmax"
    """Weights of an edge's operations in training: softmax, or drawn from Dirichlet(elu+1)."""
    select: Literal["argmax", "perturbation"] = "argmax"
    """How the last supernet becomes a cell: by its alphas, or by what removing an operation costs
    in accuracy (later, too: pdarts-fast select)."""
    perturbation_epochs: int = 5
    """Epochs of tuning after each decision of --select perturbation."""
    op_interval: int = 2
    """Epochs between two additions of an operation (--strategy opp)."""

    dataset: DatasetName = "cifar10"
    """Images to search on; digits come with scikit-learn, image-folder is one folder a class."""
    data: Path | None = None
    """Folder that holds the data set (not needed for digits)."""
    download: bool = False
    """Download CIFAR into --data if it is not there."""
    checksum: bool = True
    """Verify the MD5 of CIFAR files."""
    image_size: int = 32
    """Side in pixels to which digits and image-folder images are brought."""
    skip_broken: bool = False
    """Leave out images of an image-folder that cannot be decoded instead of stopping."""

    run_dir: Path | None = None
    """Output folder (default: runs/<dataset>-<seed>-<time>)."""
    resume: bool = False
    """Go on from the last checkpoint in --run-dir."""
    overwrite: bool = False
    """Replace what an earlier search wrote in --run-dir."""
    seed: int = 0
    """Seed of weights, alphas, data order, augmentation and dropout."""
    backend: BackendName = "auto"
    """How cells run; auto takes the fastest that is usable here."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision: bfloat16 activations (float16 with a loss scale on GPUs before Ampere),
    float32 weights, statistics and alphas."""
    cuda_graphs: bool = True
    """On a GPU, replay steps from CUDA graphs."""
    threads: int | None = None
    """CPU threads (default: as many as torch chooses)."""
    loader: LoaderName = "auto"
    """How batches are made, all give the same images: resident in the device's memory, by DALI or
    by torchvision; auto: DALI on CUDA, resident on the CPU."""
    workers: int = 2
    """Threads that decode the files of an image-folder (0: one a core); threads of the DALI
    loader, processes of the torchvision loader."""

    cells: tuple[int, ...] = (5, 11, 17)
    """Cells of the supernet in each stage; the number of values is the number of stages."""
    ops_kept: tuple[int, ...] = (8, 5, 3)
    """Live ops per edge in each stage; the last stage ends with one."""
    channels: tuple[int, ...] = (16, 16, 16)
    """Initial channels of the supernet in each stage."""
    skip_dropout: tuple[float, ...] = (0.0, 0.4, 0.7)
    """Initial dropout probability after identity skips in each stage."""
    skip_dropout_decay: float = 0.2
    """Rate per epoch of the exponential decay of skip dropout once alphas train."""
    then_train: bool = False
    """Train the result afterwards, by the train command's preset of the same name."""
    max_skips: int = 2
    """Skip connections allowed in the normal cell of the result (M)."""

    epochs: int = 25
    """Epochs of each stage."""
    warmup_epochs: int = 10
    """First epochs of each stage in which only the weights train."""
    validation_epochs: int = 4
    """Last epochs of each stage after which the alpha half is evaluated."""
    batch_size: int = 96
    """Images per step; the last batch of an epoch may be smaller."""
    data_split: float = 0.5
    """Fraction of the training images (the first ones) that trains weights; the rest alphas."""

    lr: float = 0.025
    """Initial learning rate of the weights (SGD)."""
    lr_min: float = 0.0
    """Learning rate at the end of the cosine."""
    lr_schedule: Literal["paper", "reference"] = "paper"
    """paper: epoch e uses cosine(e); reference: cosine(e+1), as the published program does."""
    momentum: float = 0.9
    """Momentum of the weights."""
    weight_decay: float = 3e-4
    """Weight decay of the weights."""
    grad_clip: float = 5.0
    """Largest gradient norm, of weights and of alphas."""
    alpha_lr: float = 6e-4
    """Learning rate of the alphas (Adam)."""
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    """Betas of Adam."""
    alpha_weight_decay: float = 1e-3
    """Weight decay of the alphas."""

    crop_padding: int = 4
    """Zero pixels added on each side before the random crop (0: no crop)."""
    flip: bool = True
    """Flip half of the training images horizontally."""
    cutout: int = 0
    """Side in pixels of the square hole cut into training images (0: none)."""

    log_interval: int = 50
    """Steps between two log lines and metrics records."""
    checkpoint_interval: int = 200
    """Steps between two checkpoints inside an epoch (0: only at its end)."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `tensorboard`)."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.cells)

    @property
    def widest_cell(self) -> int:
        """C of the widest cell: both reductions double it."""
        return 4 * max(self.channels)


PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {"dataset": "cifar100", "skip_dropout": (0.1, 0.2, 0.3)},
    "demo": {
        "dataset": "digits",
        "image_size": 16,
        "cells": (3, 4, 5),
        "channels": (8, 8, 8),
        "epochs": 4,
        "warmup_epochs": 1,
        "batch_size": 64,
        "validation_epochs": 1,
        "skip_dropout": (0.0, 0.2, 0.4),
        "alpha_lr": 6e-3,
        "crop_padding": 2,
        "flip": False,
        "log_interval": 5,
    },
}

PER_STAGE = ("ops_kept", "channels", "skip_dropout")


def preset(name: str, strategy: str = "pdarts") -> SearchConfig:
    """The configuration of a preset.

    Args:
        name: One of the presets.
        strategy: Whose numbers to take where they differ from those of P-DARTS.

    Raises:
        UsageError: There is no such preset or strategy.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset: {name!r} is not one of {', '.join(PRESETS)}")
    if strategy not in STRATEGIES:
        raise UsageError(f"--strategy: {strategy!r} is not one of {', '.join(STRATEGIES)}")
    values = {**PRESETS[name], **STRATEGY_PRESETS[strategy].get(name, {})}
    return dataclasses.replace(SearchConfig(), preset=name, strategy=strategy, **values)  # type: ignore[arg-type]


def validate(config: SearchConfig) -> SearchConfig:
    """`config` with single per-stage values repeated for all stages, after all checks.

    Raises:
        UsageError: A value makes no sense or does not go with another; names the flag.
    """
    if not config.cells:
        raise UsageError("--cells is empty: give the number of cells of each stage")
    config = _broadcast(config)
    check_choices(config, _CHOICES)
    check_device(config.device)
    check_ranges(config, _RANGES)
    _check_stages(config)
    check_strategy(config)
    check_run_flags(config.run_dir, config.resume, config.overwrite, "search")
    if config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs} leaves no epoch of --epochs {config.epochs} "
            "in which alphas train: give a smaller value"
        )
    if config.lr_min > config.lr:
        raise UsageError(f"--lr-min {config.lr_min} is larger than --lr {config.lr}")
    if config.dataset != "digits" and config.data is None:
        raise UsageError(
            f"--dataset {config.dataset} needs --data DIR, the folder of its files; "
            "--preset demo runs on bundled images"
        )
    if config.download and config.dataset not in ("cifar10", "cifar100"):
        raise UsageError(f"--download works for cifar10 and cifar100, not for {config.dataset}")
    if config.crop_padding >= config.image_size:
        raise UsageError(
            f"--crop-padding {config.crop_padding} would crop whole images of --image-size "
            f"{config.image_size} away"
        )
    if config.cutout >= config.image_size:
        raise UsageError(
            f"--cutout {config.cutout} would erase whole images of --image-size {config.image_size}"
        )
    return config


def _broadcast(config: SearchConfig) -> SearchConfig:
    changes = {}
    for name in PER_STAGE:
        values = getattr(config, name)
        if len(values) == 1:
            changes[name] = values * config.stages
        elif len(values) != config.stages:
            raise UsageError(
                f"{flag(name)} has {len(values)} values but --cells has {config.stages}: "
                "give one for each stage"
            )
    return dataclasses.replace(config, **changes)


_CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "dataset": ("digits", "cifar10", "cifar100", "image-folder"),
    "backend": ("auto", "reference", "cpu", "triton"),
    "loader": LOADERS,
    "lr_schedule": ("paper", "reference"),
    "strategy": STRATEGIES,
    "sample": ("softmax", "dirichlet"),
    "select": ("argmax", "perturbation"),
}


# Field -> (smallest, largest) allowed value; the bounds belong to the range.
_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (8, 1024),
    "seed": (0, 2**32 - 1),
    "target_weight": (0.0, 1e6),
    "beta_decay": (0.0, 1e6),
    "perturbation_epochs": (0, 100_000),
    "op_interval": (1, 100_000),
    "threads": (1, 4096),
    "workers": (0, 1024),
    "cells": (3, 1000),
    "channels": (1, 4096),
    "skip_dropout": (0.0, 0.99),
    "skip_dropout_decay": (0.0, 1e3),
    "max_skips": (0, 8),
    "epochs": (1, 100_000),
    "warmup_epochs": (0, 100_000),
    "validation_epochs": (0, 100_000),
    "batch_size": (2, 1_000_000),
    "data_split": (0.01, 0.99),
    "lr": (1e-12, 100.0),
    "lr_min": (0.0, 100.0),
    "momentum": (0.0, 0.999999),
    "weight_decay": (0.0, 1.0),
    "grad_clip": (1e-6, 1e9),
    "alpha_lr": (1e-12, 100.0),
    "alpha_betas": (0.0, 0.999999),
    "alpha_weight_decay": (0.0, 1.0),
    "crop_padding": (0, 512),
    "cutout": (0, 1024),
    "log_interval": (1, 10**9),
    "checkpoint_interval": (0, 10**9),
}


def _check_stages(config: SearchConfig) -> None:
    kept = config.ops_kept
    if kept[0] != 8:
        raise UsageError(f"--ops-kept starts with {kept[0]}: the first stage has all 8 ops")
    if any(b > a for a, b in pairwise(kept)) or kept[-1] < 2:
        raise UsageError(
            f"--ops-kept {' '.join(map(str, kept))}: values may not grow and the last must be >= 2"
        )
