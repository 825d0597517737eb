"""The commands around a derived network: train, evaluate, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pdarts_fast.flags import parse, run_defaults
from pdarts_fast.genotype import GENOTYPE_FILE
from pdarts_fast.train_config import BackendName, DatasetName, LoaderName, TrainConfig, preset


def train(arguments: Sequence[str]) -> int:
    """Train the network of a searched cell."""
    default = run_defaults(arguments, preset)
    config = parse(TrainConfig, "train", arguments, default)
    # The run holds its cell: the place it was once read from may be gone.
    own = config.run_dir is not None and (config.run_dir / GENOTYPE_FILE).is_file()
    if config.resume and own and config.genotype == default.genotype:
        config = dataclasses.replace(config, genotype=str(config.run_dir))
    from pdarts_fast.run.signals import Interrupted
    from pdarts_fast.run_train import run_train

    try:
        run_train(config)
    except Interrupted as stop:
        return 128 + stop.signum
    return 0


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a trained network: accuracy, size and speed on this machine."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a training run, a weight file of one, or a published checkpoint."""
    weights: Literal["best", "last"] = "best"
    """Which weights of a run: of the highest test accuracy, or of the last epoch."""
    genotype: str | None = None
    """The cell of a published checkpoint: a name, a genotype file, or the folder of a search."""
    dataset: DatasetName | None = None
    """Images to test on (default: those of the training; else by the number of classes)."""
    data: Path | None = None
    """Folder of the data set (default: that of the training)."""
    loader: LoaderName = "auto"
    """How batches are made (default: as in the training, else auto), see `train --help`."""
    image_size: int | None = None
    """Side of the images in pixels (default: that of the training, else 32 or 224)."""
    checksum: bool = True
    """Verify the MD5 of CIFAR files."""
    skip_broken: bool = False
    """Leave out image files that cannot be decoded instead of stopping."""
    batch_size: int = 128
    """Images per step of the accuracy."""
    speed_batch_sizes: tuple[int, ...] = (1, 32)
    """Batch sizes whose latency and throughput are measured."""
    speed: bool = True
    """Measure latency and throughput."""
    backend: BackendName | None = None
    """How cells run: auto, reference, cpu or triton (default: as in the training, else auto)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision: bfloat16 activations (float16 on GPUs before Ampere)."""
    threads: int | None = None
    """CPU threads (default: as many as torch chooses)."""
    workers: int = 2
    """Threads, or processes of the torchvision loader, that decode image files."""
    out: Path | None = None
    """Also write everything to this JSON file."""


def evaluate(arguments: Sequence[str]) -> int:
    """Measure accuracy, size and speed of a trained network."""
    command = parse(EvaluateCommand, "evaluate", arguments)
    from pdarts_fast.evaluation import run_evaluate

    run_evaluate(**dataclasses.asdict(command))
    return 0


@dataclass(frozen=True)
class ExportCommand:
    """Write a trained network as a program for other software, and check it by running it."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a training run, a weight file of one, or a published checkpoint."""
    formats: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx")
    """torch: a torch.export program (.pt2); onnx: an ONNX model (needs the extra `export`)."""
    out: Path | None = None
    """Start of the file names (default: SOURCE/network, or beside the weight file)."""
    weights: Literal["best", "last"] = "best"
    """Which weights of a run."""
    genotype: str | None = None
    """The cell of a published checkpoint: a name, a genotype file, or the folder of a search."""
    image_size: int | None = None
    """Side of the images in pixels (default: that of the training, else 32 or 224)."""


def export(arguments: Sequence[str]) -> int:
    """Write a trained network as a torch.export or ONNX program."""
    command = parse(ExportCommand, "export", arguments)
    from pdarts_fast.export import run_export

    run_export(**dataclasses.asdict(command))
    return 0
