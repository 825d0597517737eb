"""Configuration of a search: every number of the method, presets, checks. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdarts_fast.errors import UsageError

DatasetName = Literal["digits", "cifar10", "cifar100", "image-folder"]
BackendName = Literal["auto", "reference", "cpu", "triton"]


@dataclass(frozen=True)
class SearchConfig:
    """Search a cell by P-DARTS: three stages of growing depth and shrinking op sets.

    The defaults are the paper's CIFAR-10 search (arXiv 1904.12760, section 4.2). A flag given on
    the command line wins over --config, which wins over --preset.
    """

    preset: Literal["cifar10", "cifar100", "demo"] = "cifar10"
    """Starting point of all other values; demo is a minutes-long search on bundled images."""
    config: Path | None = None
    """JSON file of flag values, or the config.json of an earlier run."""

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
    """Mixed precision: bfloat16 activations, float32 weights, statistics and alphas."""
    threads: int | None = None
    """CPU threads (default: as many as torch chooses)."""
    workers: int = 2
    """Threads that decode the files of an image-folder."""

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
        "threads",
        "workers",
        "log_interval",
        "checkpoint_interval",
        "tensorboard",
    ]
)

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar100": {"dataset": "cifar100", "skip_dropout": (0.1, 0.2, 0.3)},
    "demo": {
        "dataset": "digits",
        "cells": (3, 4, 5),
        "channels": (8, 8, 8),
        "epochs": 3,
        "warmup_epochs": 1,
        "validation_epochs": 1,
        "skip_dropout": (0.0, 0.2, 0.4),
        "alpha_lr": 6e-3,
        "crop_padding": 2,
        "flip": False,
        "log_interval": 5,
    },
}

PER_STAGE = ("ops_kept", "channels", "skip_dropout")


def flag(field: str) -> str:
    """The command-line flag of a field: ``max_skips`` -> ``--max-skips``."""
    return "--" + field.replace("_", "-")


def preset(name: str) -> SearchConfig:
    """The configuration of a preset.

    Raises:
        UsageError: `name` is not one of the presets.
    """
    if name not in PRESETS:
        raise UsageError(f"--preset: {name!r} is not one of {', '.join(PRESETS)}")
    return dataclasses.replace(SearchConfig(), preset=name, **PRESETS[name])  # type: ignore[arg-type]


def to_json(config: SearchConfig) -> dict[str, Any]:
    """All fields as JSON values (paths as text, tuples as lists)."""
    return {
        name: str(value)
        if isinstance(value, Path)
        else list(value)
        if type(value) is tuple
        else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_json(values: dict[str, Any], base: SearchConfig, source: str) -> SearchConfig:
    """`base` with the values of a JSON object.

    Args:
        values: Field names (hyphens or underscores) to values.
        base: Configuration that supplies everything `values` does not name.
        source: Where the values come from, for the error message.

    Raises:
        UsageError: An unknown name, or a value of another type than the field's.
    """
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in SearchConfig.__dataclass_fields__:
            raise UsageError(
                f"{source}: unknown setting {key!r}; pdarts-fast search --help lists them"
            )
        changes[name] = _convert(name, value, source)
    return dataclasses.replace(base, **changes)


def _convert(name: str, value: Any, source: str) -> Any:
    """A JSON value as the field's type; the error names `source` and the field."""
    default = getattr(SearchConfig(), name)
    wanted = SearchConfig.__dataclass_fields__[name].type
    wrong = UsageError(f"{source}: {name} is {value!r}, wanted {wanted}")
    if isinstance(default, tuple):
        if not isinstance(value, list):
            raise wrong
        kind = type(default[0])
        if not all(_is_number(v) and (kind is float or isinstance(v, int)) for v in value):
            raise wrong
        return tuple(kind(v) for v in value)
    if "None" in str(wanted) and value is None:
        return None
    if "Path" in str(wanted):
        if not isinstance(value, str):
            raise wrong
        return Path(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(default, float):
        if not _is_number(value):
            raise wrong
        return float(value)
    if isinstance(default, int) or name == "threads":
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong
        return value
    if not isinstance(value, str):
        raise wrong
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def load_config(path: Path, base: SearchConfig) -> SearchConfig:
    """`base` with the values of a JSON file, or of the ``config`` entry of a run's config.json.

    Raises:
        UsageError: The file is missing, not JSON, or has unknown or wrongly typed values.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {path}: not a JSON file ({error})") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: wanted a JSON object of flag values")
    # These belong to the run that wrote the file, not to its settings.
    own = {"config", "run_dir", "resume", "overwrite"}
    values = {k: v for k, v in values.items() if k.replace("-", "_") not in own}
    return from_json(values, base, f"--config {path}")


def differing(saved: dict[str, Any], config: SearchConfig) -> list[str]:
    """Flags whose value changes the result and differs between a saved run and `config`.

    Args:
        saved: A configuration as `to_json` gives it.

    Returns:
        One text a flag, ``--epochs (3, now 5)``.
    """
    now = to_json(config)
    return [
        f"{flag(name)} ({saved.get(name)}, now {now[name]})"
        for name in now
        if name not in EXECUTION_FIELDS and saved.get(name) != now[name]
    ]


def validate(config: SearchConfig) -> SearchConfig:
    """`config` with single per-stage values repeated for all stages, after all checks.

    Raises:
        UsageError: A value makes no sense or does not go with another; names the flag.
    """
    config = _broadcast(config)
    _check_choices(config)
    _check_ranges(config)
    _check_stages(config)
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite exclude each other: give one of them")
    if config.resume and config.run_dir is None:
        raise UsageError("--resume needs --run-dir DIR, the folder of the search to go on with")
    if config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs} leaves no epoch of --epochs {config.epochs} "
            "in which alphas train: give a smaller value"
        )
    if config.lr_min > config.lr:
        raise UsageError(f"--lr-min {config.lr_min} is larger than --lr {config.lr}")
    if config.dataset != "digits" and config.data is None:
        raise UsageError(f"--dataset {config.dataset} needs --data DIR, the folder of its files")
    if config.download and config.dataset not in ("cifar10", "cifar100"):
        raise UsageError(f"--download works for cifar10 and cifar100, not for {config.dataset}")
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
    "lr_schedule": ("paper", "reference"),
}


def _check_choices(config: SearchConfig) -> None:
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise UsageError(f"{flag(name)}: {value!r} is not one of {', '.join(choices)}")
    device = config.device
    if device not in ("auto", "cpu", "cuda") and not (
        device.startswith("cuda:") and device[5:].isdigit()
    ):
        raise UsageError(f"--device: {device!r} is not auto, cpu, cuda or cuda:N")


# Field -> (smallest, largest) allowed value; the bounds belong to the range.
_RANGES: dict[str, tuple[float, float]] = {
    "image_size": (8, 1024),
    "seed": (0, 2**32 - 1),
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


def _check_ranges(config: SearchConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not (math.isfinite(one) and low <= one <= high):
                raise UsageError(f"{flag(name)} {one}: wanted a value from {low:g} to {high:g}")


def _check_stages(config: SearchConfig) -> None:
    kept = config.ops_kept
    if not config.cells:
        raise UsageError("--cells is empty: give the number of cells of each stage")
    if kept[0] != 8:
        raise UsageError(f"--ops-kept starts with {kept[0]}: the first stage has all 8 ops")
    if any(b > a for a, b in zip(kept, kept[1:], strict=False)) or kept[-1] < 2:
        raise UsageError(
            f"--ops-kept {' '.join(map(str, kept))}: values may not grow and the last must be >= 2"
        )
