"""The train command: checks, set-up, the training itself, report and summary."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pdarts_fast import config as search_config
from pdarts_fast.config import SearchConfig
from pdarts_fast.cost import network_cost
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import GENOTYPE_FILE, Genotype, load_genotype, save_genotype
from pdarts_fast.run.directory import (
    METRICS,
    RunDirectory,
    default_run_dir,
    read_config,
    require_usable,
)
from pdarts_fast.run.drawing import draw_genotype
from pdarts_fast.run.environment import hardware
from pdarts_fast.run.files import disk_errors
from pdarts_fast.run.metrics import require_tensorboard
from pdarts_fast.run.progress import duration
from pdarts_fast.run.setup import command_line, description, make_display, pick_device
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.run.train_report import KIND, write_train_report
from pdarts_fast.settings import differing
from pdarts_fast.train_config import TrainConfig, preset, validate
from pdarts_fast.train_data import TrainData, open_data
from pdarts_fast.training import Progress, Training

log = logging.getLogger(__name__)


def run_train(config: TrainConfig) -> Path:
    """Run a training from its configuration to its report.

    Args:
        config: As parsed; it is validated here.

    Returns:
        The run directory.

    Raises:
        UsageError: A value, or a combination of values, that cannot work; nothing was written.
        RunError: Data, disk or numbers stopped the training; what was written stays.
        Interrupted: A signal stopped it after writing a checkpoint.
    """
    config = validate(config)
    device = pick_device(config.device, config.amp)
    assert config.genotype is not None
    genotype = load_genotype(config.genotype)
    if config.tensorboard:
        require_tensorboard()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = config.run_dir or default_run_dir(f"train-{config.dataset}", config.seed)
    require_usable(path, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        _require_same_training(config, path)
    data = open_data(config, device)
    run = RunDirectory(path, resume=config.resume, overwrite=config.overwrite, logs=[METRICS])
    try:
        with StopRequest() as stop:
            progress = _train(config, genotype, data, run, device, stop)
        with disk_errors(path):
            draw_genotype(genotype, path / "cell")
        report = write_train_report(path)
    except Interrupted as signal:
        resume = shlex.join(["pdarts-fast", "train", "--resume", "--run-dir", str(path)])
        log.warning("stopped by %s; its checkpoint is there: %s goes on", signal, resume)
        raise
    finally:
        run.close()
    _print_summary(progress, path, report)
    return path


def _require_same_training(config: TrainConfig, path: Path) -> None:
    """Refuse to resume something else, before any work."""
    saved = read_config(path)
    if saved is None:
        return
    if saved.get("kind") != KIND:
        raise UsageError(f"--run-dir {path} holds a search, no training: give another folder")
    others = differing(saved["config"], config)
    if others:
        raise RunError(
            f"the training in {path} was made with other settings: {', '.join(others)}; "
            "leave those flags out to resume, or give another --run-dir"
        )


def _train(
    config: TrainConfig,
    genotype: Genotype,
    data: TrainData,
    run: RunDirectory,
    device: torch.device,
    stop: StopRequest,
) -> Progress:
    display = make_display()
    try:
        training = Training(config, genotype, data, run, device, display)
        if training.resumed:
            steps = training.progress.global_step
            display.message(f"goes on in {run.path} after {steps} steps")
        else:
            if config.resume:
                log.warning("no checkpoint in %s: the training starts from its beginning", run.path)
            display.message(f"writes into {run.path}")
            save_genotype(run.path / GENOTYPE_FILE, genotype)
            run.write_json("config.json", _description(config, training, data, device))
        return training.run(stop)
    finally:
        display.close()


def _description(
    config: TrainConfig, training: Training, data: TrainData, device: torch.device
) -> dict[str, Any]:
    """What config.json holds: the settings and what they were run with."""
    with torch.device("meta"):
        network = dataclasses.replace(training.spec, auxiliary=False).build()
    cost = network_cost(network, config.image_size)
    base = preset(config.preset)
    return description(
        config,
        command_line(config, config.preset, base),
        data.facts,
        hardware(device, "torch"),
    ) | {"network": dataclasses.asdict(cost)}


def _print_summary(progress: Progress, path: Path, report: Path) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.print(
        f"\nbest test accuracy {100 * progress.best_accuracy:.2f}% "
        f"(epoch {progress.best_epoch + 1} of {progress.epoch}), {duration(progress.seconds)}"
    )
    console.print(f"evaluate: pdarts-fast evaluate {path}", soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


def check_then_train(config: SearchConfig) -> None:
    """Raise `UsageError` before a search if the training after it could not start."""
    try:
        validate(then_train(config, config.run_dir or Path("runs")))
    except UsageError as error:
        raise UsageError(f"--then-train: {error}") from error


def then_train(config: SearchConfig, run_dir: Path) -> TrainConfig:
    """The training that follows a search: its preset's recipe on its images, in ``train/``.

    Args:
        config: The finished search.
        run_dir: Its run directory.
    """
    recipe = preset(config.preset)
    path = run_dir / "train"
    same = ("data", "download", "checksum", "seed", "device", "amp", "threads", "workers")
    shared: dict[str, Any] = {name: getattr(config, name) for name in (*same, "skip_broken")}
    if config.image_size != search_config.preset(config.preset).image_size:
        shared["image_size"] = config.image_size
        # The auxiliary head is made for the recipe's size.
        shared["auxiliary"] = False
    return dataclasses.replace(
        recipe,
        genotype=str(run_dir),
        dataset=config.dataset,
        run_dir=path,
        # Killed early it may have left less than its config.json.
        resume=config.resume and path.is_dir(),
        overwrite=config.overwrite,
        tensorboard=config.tensorboard,
        **shared,
    )
