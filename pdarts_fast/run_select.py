"""Perturbation-based selection as a run of its own, beside the search whose supernet it takes."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pdarts_fast import search_space
from pdarts_fast.alphas import load_alphas
from pdarts_fast.config import SearchConfig, preset, validate
from pdarts_fast.data import Dataset, load_dataset
from pdarts_fast.distributed import SINGLE
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import Genotype
from pdarts_fast.run.directory import METRICS, RunDirectory, read_config, require_usable
from pdarts_fast.run.drawing import draw_genotype
from pdarts_fast.run.environment import hardware
from pdarts_fast.run.files import disk_errors
from pdarts_fast.run.report import SELECTION, write_report
from pdarts_fast.run.setup import description, make_display, pick_device
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.search_result import write_genotypes
from pdarts_fast.search_space import Alphas, Derivation
from pdarts_fast.selection import Selection, load_supernet
from pdarts_fast.settings import from_json, settings_of
from pdarts_fast.strategies.base import Result
from pdarts_fast.strategies.choose import make_strategy
from pdarts_fast.strategies.perturbation import cap_skips
from pdarts_fast.strategies.rapdarts import RapDarts, make_costs
from pdarts_fast.strategies.repair import log_probabilities

log = logging.getLogger(__name__)

SELECTION_FOLDER = "select-perturbation"


def run_select(
    source: Path,
    *,
    epochs: int | None = None,
    data: Path | None = None,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Select a cell from the last supernet of a finished search.

    Args:
        source: Run directory of the search.
        epochs: Epochs of tuning between decisions; None for those of the search's settings.
        data: Folder of the data set, if it is not where the search read it.
        backend, device, threads: How it runs; None for the search's.
        resume: Go on with a selection that was stopped.
        overwrite: Replace an earlier selection.

    Returns:
        The folder ``select-perturbation`` of the search's run directory.

    Raises:
        UsageError: `source` holds no finished search, or a value makes no sense.
        RunError: Data, disk or numbers stopped the selection.
        Interrupted: A signal stopped it after writing a checkpoint.
    """
    folder = source / SELECTION_FOLDER
    if resume and not (folder / "config.json").is_file():
        raise UsageError(f"--resume: {folder} holds no selection; leave --resume out to start one")
    given = {
        "perturbation_epochs": epochs,
        "data": data,
        "backend": backend,
        "device": device,
        "threads": threads,
    }
    config = _settings(source, folder if resume else source, given)
    require_usable(folder, resume=resume, overwrite=overwrite)
    place = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load_dataset(
        config.dataset,
        config.data,
        image_size=config.image_size,
        download=False,
        checksum=config.checksum,
        workers=config.workers,
        skip_broken=config.skip_broken,
    )
    try:
        with StopRequest() as stop:
            result = select(
                config, dataset, source, place, stop, resume=resume, overwrite=overwrite
            )
    except Interrupted as signal:
        again = shlex.join(["pdarts-fast", "select", str(source), "--resume"])
        log.warning("stopped by %s; its checkpoint is there: %s goes on", signal, again)
        raise
    print(result.derivation.restricted[config.max_skips])
    return folder


def _settings(source: Path, settings: Path, given: dict[str, Any]) -> SearchConfig:
    """The settings of the search, or of the selection to go on with, less what is `given`."""
    saved = read_config(source)
    if saved is None or saved.get("kind", "search") != "search":
        raise UsageError(f"{source}: no config.json of a search in it; wanted its run directory")
    saved = read_config(settings) or {}
    config = from_json(settings_of(saved), preset("cifar10"), str(settings / "config.json"))
    changes: dict[str, Any] = {"select": "perturbation", "run_dir": source}
    changes |= {name: value for name, value in given.items() if value is not None}
    return validate(dataclasses.replace(config, **changes))


def select(
    config: SearchConfig,
    dataset: Dataset,
    source: Path,
    device: torch.device,
    stop: StopRequest,
    *,
    resume: bool,
    overwrite: bool = False,
) -> Result:
    """Run a selection in the folder ``select-perturbation`` of a search's run directory.

    Args:
        config: That of the search, validated.
        dataset: Its images.
        source: Its run directory; alphas.json and the last supernet are read.
        device: Where the supernet runs.
        stop: Looked at after every step.
        resume: Go on with what the folder holds.
        overwrite: Replace what the folder holds.

    Returns:
        The genotypes, which genotype.json of the folder holds too.

    Raises:
        UsageError: The search has not ended.
        RunError: Data, disk or numbers stopped the selection.
        Interrupted: A signal stopped it after writing a checkpoint.
    """
    finished = load_alphas(source)
    tensors = _last_supernet(config, source, len(finished))
    derivation = search_space.derive(finished)
    switches = [search_space.all_switches(), *derivation.switches[:-1]][-1]
    network = load_supernet(config, dataset.num_classes, switches, tensors).to(device)
    run = RunDirectory(
        source / SELECTION_FOLDER, resume=resume, overwrite=overwrite, logs=[METRICS]
    )
    display = make_display()
    try:
        selection = Selection(config, dataset, network, switches, run, device, display)
        if not selection.resumed:
            run.write_json("config.json", _description(config, dataset, source, device, network))
        genotype = selection.run(stop)
        capped, swaps = cap_skips(genotype, selection.decisions, config.max_skips)
        facts = {
            "selection": {
                "method": "perturbation",
                "tuning_epochs": config.perturbation_epochs,
                "decisions": [decision.to_json() for decision in selection.decisions],
                "skip_swaps": swaps,
            }
        }
        capped, more = _within_targets(config, dataset, source, device, capped, finished)
        result = Result(
            Derivation(derivation.switches, genotype, {config.max_skips: capped}), facts | more
        )
        write_genotypes(run, SINGLE, result, config.max_skips)
        with disk_errors(run.path):
            draw_genotype(capped, run.path / "cell")
            write_report(run.path)
    finally:
        display.close()
        run.close()
    return result


def _last_supernet(config: SearchConfig, source: Path, stages: int) -> dict[str, torch.Tensor]:
    path = source / f"supernet-stage{config.stages}.safetensors"
    if stages < config.stages or not path.is_file():
        raise UsageError(
            f"{source}: the search has not ended (no {path.name}); "
            f"pdarts-fast search --resume --run-dir {source} goes on with it"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error


def _within_targets(
    config: SearchConfig,
    dataset: Dataset,
    source: Path,
    device: torch.device,
    genotype: Genotype,
    finished: list[Any],
) -> tuple[Genotype, dict[str, Any]]:
    """The genotype repaired to the targets of the search, if it has any."""
    costs = make_costs(config, dataset.num_classes, device, source)
    strategy = make_strategy(config, device, costs)
    if not isinstance(strategy, RapDarts):
        return genotype, {}
    alphas: list[Alphas] = finished
    fixed, swaps = strategy.repaired(genotype, config.max_skips, log_probabilities(alphas))
    return fixed, strategy.facts(fixed, swaps)


def _description(
    config: SearchConfig, dataset: Dataset, source: Path, device: torch.device, network: Any
) -> dict[str, Any]:
    epochs = str(config.perturbation_epochs)
    command = shlex.join(["pdarts-fast", "select", str(source), "--epochs", epochs])
    values = description(
        config, command, dataset.facts(config.dataset), hardware(device, network.backend)
    )
    return values | {"kind": SELECTION}
