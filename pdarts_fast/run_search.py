"""The search command: checks, set-up, the search itself, drawings, report and summary."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pdarts_fast.capture.cuda import check_cuda_graphs
from pdarts_fast.config import SearchConfig, differing, preset, validate
from pdarts_fast.data import Dataset, load_dataset, split_indices
from pdarts_fast.distributed import Ranks, joined
from pdarts_fast.errors import RunError
from pdarts_fast.kernels import backends
from pdarts_fast.run.clock import REPORT, Clock
from pdarts_fast.run.directory import RunDirectory, default_run_dir, read_config, require_usable
from pdarts_fast.run.drawing import draw_genotype
from pdarts_fast.run.environment import hardware
from pdarts_fast.run.files import disk_errors
from pdarts_fast.run.metrics import require_tensorboard
from pdarts_fast.run.progress import duration
from pdarts_fast.run.report import write_report
from pdarts_fast.run.report_data import read_run
from pdarts_fast.run.setup import (
    check_batch_size,
    command_line,
    description,
    make_display,
    pick_device,
)
from pdarts_fast.run.shared import for_this_attempt, load_on_all, open_run
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.run_select import SELECTION_FOLDER, select
from pdarts_fast.search import Search
from pdarts_fast.search_result import write_genotypes
from pdarts_fast.search_space import Derivation
from pdarts_fast.strategies.base import Strategy
from pdarts_fast.strategies.choose import make_strategy
from pdarts_fast.strategies.rapdarts import make_costs, write_costs

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
    clock = Clock()
    with joined() as ranks:
        # The folder to resume may be on the machine of rank 0 only, and with it the settings.
        config = ranks.first(lambda: for_this_attempt(ranks.launch, validate(config)))
        path = ranks.first(lambda: config.run_dir or default_run_dir(config.dataset, config.seed))
        device = ranks.together(lambda: _check(config, path, ranks))
        ranks.use(device)
        return _run(config, path, device, ranks, clock)


def _check(config: SearchConfig, path: Path, ranks: Ranks) -> torch.device:
    """The device, after the checks that need no data."""
    check_batch_size(config.batch_size, ranks.size)
    require_usable(path, resume=config.resume, overwrite=config.overwrite)
    if config.resume:
        _require_same_settings(config, path)
    device = pick_device(config.device, ranks.launch)
    check_cuda_graphs(device, config.cuda_graphs, ranks.backend(device))
    backends.resolve(config.backend, device, config.widest_cell)
    if config.tensorboard:
        require_tensorboard()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return device


def _load(config: SearchConfig) -> Dataset:
    """The images, of which each half has at least one."""
    dataset = load_dataset(
        config.dataset,
        config.data,
        image_size=config.image_size,
        download=config.download,
        checksum=config.checksum,
        workers=config.workers,
        skip_broken=config.skip_broken,
    )
    split_indices(len(dataset.train), config.data_split)
    return dataset


def _run(
    config: SearchConfig, path: Path, device: torch.device, ranks: Ranks, clock: Clock
) -> Path:
    """The search of a configuration that has passed the checks."""
    dataset = load_on_all(ranks, config.download, lambda: _load(config))
    resumed = path if config.resume else None
    costs = ranks.first(lambda: make_costs(config, dataset.num_classes, device, resumed))
    run = open_run(ranks, path, resume=config.resume, overwrite=config.overwrite)
    try:
        with StopRequest(ranks.agree if ranks.size > 1 else None) as stop:
            if costs is not None and run.writes:
                write_costs(costs, path)
            strategy = make_strategy(config, device, costs)
            derivation = _search(config, dataset, run, device, strategy, stop, ranks, clock)
            if config.select == "perturbation":
                derivation = _select(config, dataset, run, device, stop, ranks)
        if run.writes:
            _write_outputs(path, derivation, config, clock)
    except Interrupted as signal:
        resume = shlex.join(["pdarts-fast", "search", "--resume", "--run-dir", str(path)])
        log.warning("stopped by %s; its checkpoint is there: %s goes on", signal, resume)
        raise
    finally:
        run.close()
    return path


def _require_same_settings(config: SearchConfig, path: Path) -> None:
    """Refuse to resume a run with other settings, before any work."""
    saved = read_config(path)
    others = differing(saved["config"], config) if saved is not None else []
    if others:
        raise RunError(
            f"the search in {path} was made with other settings: {', '.join(others)}; "
            "leave those flags out to resume, or give another --run-dir"
        )


def _search(
    config: SearchConfig,
    dataset: Dataset,
    run: RunDirectory,
    device: torch.device,
    strategy: Strategy,
    stop: StopRequest,
    ranks: Ranks,
    clock: Clock,
) -> Derivation:
    display = make_display(ranks.is_first)
    try:
        search = ranks.together(
            lambda: Search(config, dataset, run, device, display, strategy, ranks, clock)
        )
        if search.resumed:
            position = search.state.position
            display.message(f"goes on in {run.path} after {position.global_step} steps")
        else:
            if config.resume:
                log.warning("no checkpoint in %s: the search starts from its beginning", run.path)
            display.message(f"writes into {run.path}")
            run.write_json("config.json", _description(config, dataset, device, ranks))
        return search.run(stop)
    finally:
        display.close()


def _select(
    config: SearchConfig,
    dataset: Dataset,
    run: RunDirectory,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks,
) -> Derivation:
    """Let a selection on the last supernet take the place of the result by alphas."""
    started = ranks.first(lambda: (run.path / SELECTION_FOLDER / "config.json").is_file())
    resume = config.resume and started
    result = select(
        config, dataset, run.path, device, stop, ranks, resume=resume, overwrite=not resume
    )
    return write_genotypes(run, ranks, result, config.max_skips)


def _description(
    config: SearchConfig, dataset: Dataset, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """What config.json holds: the settings and what they were run with."""
    return description(
        config,
        search_command(config),
        dataset.facts(config.dataset),
        hardware(device, backends.resolve(config.backend, device, config.widest_cell), ranks.size),
    )


def search_command(config: SearchConfig) -> str:
    """The command line that gives `config`: its preset and the flags that differ from it."""
    base = dataclasses.replace(preset(config.preset, config.strategy), strategy="pdarts")
    return command_line(config, config.preset, base)


def train_command(run_dir: Path) -> str:
    """The command line that trains what a search in `run_dir` has found."""
    return shlex.join(["pdarts-fast", "train", "--genotype", str(run_dir)])


def _write_outputs(path: Path, derivation: Derivation, config: SearchConfig, clock: Clock) -> None:
    genotype = derivation.restricted[config.max_skips]
    with disk_errors(path):
        draw_genotype(genotype, path / "cell")
        report = write_report(path, train_command=train_command(path))
    clock.lap(REPORT)
    console = Console(file=sys.stdout, highlight=False)
    console.print(f"\ngenotype (at most {config.max_skips} skips in the normal cell):")
    console.print(str(genotype), soft_wrap=True)
    for stage, record in read_run(path).stages.items():
        console.print(
            f"stage {stage}: {record['cells']} cells, {record['ops']} ops an edge, "
            f"{duration(record['seconds'])}"
        )
    console.print(clock.summary(), soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)
