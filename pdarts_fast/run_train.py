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
from pdarts_fast.capture.cuda import check_cuda_graphs
from pdarts_fast.cells import choice
from pdarts_fast.config import SearchConfig
from pdarts_fast.cost import network_cost
from pdarts_fast.distributed import Ranks, joined
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import GENOTYPE_FILE, Genotype, load_genotype, save_genotype
from pdarts_fast.run.clock import REPORT, Clock
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
from pdarts_fast.run.setup import (
    check_batch_size,
    command_line,
    description,
    make_display,
    pick_device,
)
from pdarts_fast.run.shared import for_this_attempt, load_on_all, open_run
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.run.train_report import KIND, write_train_report
from pdarts_fast.settings import differing
from pdarts_fast.train_config import FOLDERS, TrainConfig, preset, validate
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
    clock = Clock()
    with joined() as ranks:
        # The folder to resume may be on the machine of rank 0 only, and with it the settings.
        config = ranks.first(lambda: for_this_attempt(ranks.launch, validate(config)))
        path = ranks.first(
            lambda: config.run_dir or default_run_dir(f"train-{config.dataset}", config.seed)
        )
        device = ranks.together(lambda: _check(config, path, ranks))
        genotype = ranks.first(lambda: load_genotype(str(config.genotype)))
        ranks.use(device)
        return _run(config, genotype, path, device, ranks, clock)


def _check(config: TrainConfig, path: Path, ranks: Ranks) -> torch.device:
    """The device, after the checks that need no data."""
    check_batch_size(config.batch_size, ranks.size)
    device = pick_device(config.device, ranks.launch)
    check_cuda_graphs(device, config.cuda_graphs, ranks.backend(device))
    choice.resolve(config.backend, device.type, config.widest_cell)
    if config.tensorboard:
        require_tensorboard()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    require_usable(path, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        _require_same_training(config, path)
    return device


def _run(
    config: TrainConfig,
    genotype: Genotype,
    path: Path,
    device: torch.device,
    ranks: Ranks,
    clock: Clock,
) -> Path:
    """The training of a configuration that has passed the checks."""
    data = load_on_all(
        ranks,
        config.download,
        lambda: open_data(config, device, shard=ranks.shard),
    )
    run = open_run(ranks, path, resume=config.resume, overwrite=config.overwrite, logs=[METRICS])
    try:
        with StopRequest(ranks.agree if ranks.size > 1 else None) as stop:
            progress = _train(config, genotype, data, run, device, stop, ranks, clock)
        if run.writes:
            with disk_errors(path):
                draw_genotype(genotype, path / "cell")
            report = write_train_report(path)
        clock.lap(REPORT)
    except Interrupted as signal:
        resume = shlex.join(["pdarts-fast", "train", "--resume", "--run-dir", str(path)])
        log.warning("stopped by %s; its checkpoint is there: %s goes on", signal, resume)
        raise
    finally:
        run.close()
    if run.writes:
        _print_summary(progress, path, report, clock)
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
    ranks: Ranks,
    clock: Clock,
) -> Progress:
    display = make_display(ranks.is_first)
    try:
        training = ranks.together(
            lambda: Training(config, genotype, data, run, device, display, ranks, clock)
        )
        if training.resumed:
            steps = training.progress.global_step
            display.message(f"goes on in {run.path} after {steps} steps")
        else:
            if config.resume:
                log.warning("no checkpoint in %s: the training starts from its beginning", run.path)
            display.message(f"writes into {run.path}")
            if run.writes:
                save_genotype(run.path / GENOTYPE_FILE, genotype)
            run.write_json("config.json", _description(config, training, data, device, ranks))
        return training.run(stop)
    finally:
        display.close()


def _description(
    config: TrainConfig,
    training: Training,
    data: TrainData,
    device: torch.device,
    ranks: Ranks,
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
        hardware(
            device, choice.resolve(config.backend, device.type, config.widest_cell), ranks.size
        ),
    ) | {"network": dataclasses.asdict(cost)}


def _print_summary(progress: Progress, path: Path, report: Path, clock: Clock) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.print(
        f"\nbest test accuracy {100 * progress.best_accuracy:.2f}% "
        f"(epoch {progress.best_epoch + 1} of {progress.epoch}), {duration(progress.seconds)}"
    )
    console.print(clock.summary(), soft_wrap=True)
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
    same = (
        "data",
        "download",
        "checksum",
        "seed",
        "backend",
        "device",
        "amp",
        "threads",
        "workers",
    )
    more = ("skip_broken", "cuda_graphs")
    shared: dict[str, Any] = {name: getattr(config, name) for name in (*same, *more)}
    if config.dataset not in FOLDERS:
        shared["loader"] = config.loader
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
