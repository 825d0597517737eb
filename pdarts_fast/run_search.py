"""The search command: checks, set-up, the search itself, drawings, report and summary."""

from __future__ import annotations

import datetime
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pdarts_fast.config import SearchConfig, flag, preset, to_json, validate
from pdarts_fast.data import Dataset, load_dataset
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.run.directory import RunDirectory, default_run_dir
from pdarts_fast.run.drawing import draw_genotype
from pdarts_fast.run.environment import git_state, hardware, versions
from pdarts_fast.run.files import disk_errors
from pdarts_fast.run.metrics import require_tensorboard
from pdarts_fast.run.progress import BarDisplay, Display, LogDisplay, duration
from pdarts_fast.run.report import write_report
from pdarts_fast.run.report_data import read_run
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.search import Search
from pdarts_fast.search_space import Derivation

log = logging.getLogger(__name__)


def run_search(config: SearchConfig) -> Path:
    """Run a search from its configuration to its report.

    Args:
        config: As parsed; it is validated here.

    Returns:
        The run directory.

    Raises:
        UsageError: A value, or a combination of values, that cannot work; nothing was written.
        RunError: Data, disk or numbers stopped the search; what was written stays.
        Interrupted: A signal stopped it after writing a checkpoint.
    """
    config = validate(config)
    device = pick_device(config)
    backends.check(config.backend)
    if config.tensorboard:
        require_tensorboard()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load_dataset(
        config.dataset,
        config.data,
        image_size=config.image_size,
        download=config.download,
        checksum=config.checksum,
        workers=config.workers,
        skip_broken=config.skip_broken,
    )
    path = config.run_dir or default_run_dir(config)
    run = RunDirectory(path, resume=config.resume, overwrite=config.overwrite)
    try:
        with StopRequest() as stop:
            derivation = _search(config, dataset, run, device, stop)
        _write_outputs(path, derivation, config)
    finally:
        run.close()
    return path


def pick_device(config: SearchConfig) -> torch.device:
    """The device of --device, with ``auto`` resolved.

    Raises:
        UsageError: The device is not there, or cannot do what --amp needs.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA GPU here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
        if config.amp and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError(f"--amp needs a GPU with bfloat16; {device} has none: leave it out")
    return device


def _search(
    config: SearchConfig,
    dataset: Dataset,
    run: RunDirectory,
    device: torch.device,
    stop: StopRequest,
) -> Derivation:
    display = _display()
    try:
        search = Search(config, dataset, run, device, display)
        if search.resumed:
            position = search.state.position
            display.message(f"goes on in {run.path} after {position.global_step} steps")
        else:
            if config.resume:
                log.warning("no checkpoint in %s: the search starts from its beginning", run.path)
            run.write_json("config.json", _description(config, dataset, device))
        return search.run(stop)
    finally:
        display.close()


def _display() -> Display:
    console = Console(stderr=True)
    return BarDisplay(console) if console.is_terminal else LogDisplay()


def _description(config: SearchConfig, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """What config.json holds: the settings and what they were run with."""
    return {
        "config": to_json(config),
        "command": search_command(config),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(device, backends.resolve(config.backend, device)),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dataset": {
            "name": config.dataset,
            "num_classes": dataset.num_classes,
            "classes": list(dataset.train.classes),
            "train_images": len(dataset.train),
            "test_images": len(dataset.test),
            "image_size": dataset.train.images.shape[-1],
            "mean": list(dataset.mean),
            "std": list(dataset.std),
        },
    }


def search_command(config: SearchConfig) -> str:
    """The command line that gives `config`: its preset and the flags that differ from it."""
    base = to_json(preset(config.preset))
    words = ["pdarts-fast", "search", "--preset", config.preset]
    for name, value in to_json(config).items():
        if name in ("config", "resume", "overwrite") or value == base[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            values = value if isinstance(value, list) else [value]
            words += [flag(name), *(str(v) for v in values)]
    return shlex.join(words)


def train_command(run_dir: Path) -> str:
    """The command line that trains what a search in `run_dir` has found."""
    return shlex.join(["pdarts-fast", "train", "--genotype", str(run_dir)])


def _write_outputs(path: Path, derivation: Derivation, config: SearchConfig) -> None:
    genotype = derivation.restricted[config.max_skips]
    with disk_errors(path):
        draw_genotype(genotype, path / "cell")
        report = write_report(path, train_command=train_command(path))
    console = Console(file=sys.stdout, highlight=False)
    console.print(f"\ngenotype (at most {config.max_skips} skips in the normal cell):")
    console.print(str(genotype), soft_wrap=True)
    for stage, record in read_run(path).stages.items():
        console.print(
            f"stage {stage}: {record['cells']} cells, {record['ops']} ops an edge, "
            f"{duration(record['seconds'])}"
        )
    console.print(f"report: {report}", soft_wrap=True)
