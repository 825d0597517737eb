"""Perturbation-based selection as a run of its own, beside the search whose supernet it takes."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pdarts_fast import search_space
from pdarts_fast.alphas import load_alphas
from pdarts_fast.config import SearchConfig, preset, validate
from pdarts_fast.data import Dataset, load_dataset
from pdarts_fast.distributed import SINGLE, Ranks, joined
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.genotype import Genotype
from pdarts_fast.run.directory import METRICS, read_config, require_usable
from pdarts_fast.run.drawing import draw_genotype
from pdarts_fast.run.environment import hardware
from pdarts_fast.run.files import disk_errors
from pdarts_fast.run.report import SELECTION, write_report
from pdarts_fast.run.setup import check_batch_size, description, make_display, pick_device
from pdarts_fast.run.shared import open_run, restarted_in
from pdarts_fast.run.signals import Interrupted, StopRequest
from pdarts_fast.search_result import write_genotypes
from pdarts_fast.search_space import Alphas, Derivation
from pdarts_fast.selection import Selection, load_supernet
from pdarts_fast.settings import from_json, settings_of
from pdarts_fast.strategies.base import Result
from pdarts_fast.strategies.choose import make_strategy
from pdarts_fast.strategies.perturbation import cap_skips
from pdarts_fast.strategies.rapdarts import Costs, RapDarts, make_costs
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
    given = {
        "perturbation_epochs": epochs,
        "data": data,
        "backend": backend,
        "device": device,
        "threads": threads,
    }
    with joined() as ranks:
        # The folder may be on the machine of rank 0 only.
        if ranks.first(lambda: restarted_in(ranks.launch, folder)):
            resume = ranks.first(lambda: (folder / "config.json").is_file())
            overwrite = not resume
        config = ranks.first(lambda: _settings(source, given, resume=resume, overwrite=overwrite))
        place = ranks.together(lambda: _device(config, ranks))
        ranks.use(place)
        dataset = ranks.together(lambda: _load(config))
        try:
            with StopRequest(ranks.agree if ranks.size > 1 else None) as stop:
                result = select(
                    config, dataset, source, place, stop, ranks, resume=resume, overwrite=overwrite
                )
        except Interrupted as signal:
            again = shlex.join(["pdarts-fast", "select", str(source), "--resume"])
            log.warning("stopped by %s; its checkpoint is there: %s goes on", signal, again)
            raise
        if ranks.is_first:
            print(result.derivation.restricted[config.max_skips])
    return folder


def _settings(
    source: Path, given: dict[str, Any], *, resume: bool, overwrite: bool
) -> SearchConfig:
    """The settings of the search, or of the selection to go on with, less what is `given`."""
    folder = source / SELECTION_FOLDER
    if resume and not (folder / "config.json").is_file():
        raise UsageError(f"--resume: {folder} holds no selection; leave --resume out to start one")
    saved = read_config(source)
    if saved is None or saved.get("kind", "search") != "search":
        raise UsageError(f"{source}: no config.json of a search in it; wanted its run directory")
    settings = folder if resume else source
    saved = read_config(settings) or {}
    config = from_json(settings_of(saved), preset("cifar10"), str(settings / "config.json"))
    changes: dict[str, Any] = {"select": "perturbation", "run_dir": source}
    changes |= {name: value for name, value in given.items() if value is not None}
    require_usable(folder, resume=resume, overwrite=overwrite)
    return validate(dataclasses.replace(config, **changes))


def _device(config: SearchConfig, ranks: Ranks) -> torch.device:
    """The device of this rank, after the checks that need no data."""
    check_batch_size(config.batch_size, ranks.size)
    device = pick_device(config.device, ranks.launch)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return device


def _load(config: SearchConfig) -> Dataset:
    return load_dataset(
        config.dataset,
        config.data,
        image_size=config.image_size,
        download=False,
        checksum=config.checksum,
        workers=config.workers,
        skip_broken=config.skip_broken,
    )


def select(
    config: SearchConfig,
    dataset: Dataset,
    source: Path,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks = SINGLE,
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
        ranks: The processes that make this selection together; the folders are rank 0's.
        resume: Go on with what the folder holds.
        overwrite: Replace what the folder holds.

    Returns:
        The genotypes, which genotype.json of the folder holds too.

    Raises:
        UsageError: The search has not ended.
        RunError: Data, disk or numbers stopped the selection.
        Interrupted: A signal stopped it after writing a checkpoint.
    """
    finished, tensors = ranks.first(lambda: _read(config, source))
    derivation = search_space.derive(finished)
    switches = [search_space.all_switches(), *derivation.switches[:-1]][-1]
    network = load_supernet(config, dataset.num_classes, switches, tensors).to(device)
    run = open_run(
        ranks, source / SELECTION_FOLDER, resume=resume, overwrite=overwrite, logs=[METRICS]
    )
    display = make_display(ranks.is_first)
    try:
        selection = ranks.together(
            lambda: Selection(config, dataset, network, switches, run, device, display, ranks)
        )
        if not selection.resumed:
            run.write_json(
                "config.json",
                _description(config, dataset, source, device, network.backend, ranks),
            )
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
        costs = ranks.first(lambda: make_costs(config, dataset.num_classes, device, source))
        capped, more = _within_targets(config, device, costs, capped, finished)
        result = Result(
            Derivation(derivation.switches, genotype, {config.max_skips: capped}), facts | more
        )
        write_genotypes(run, ranks, result, config.max_skips)
        if run.writes:
            with disk_errors(run.path):
                draw_genotype(capped, run.path / "cell")
                write_report(run.path)
    finally:
        display.close()
        run.close()
    return result


def _read(config: SearchConfig, source: Path) -> tuple[Sequence[Alphas], dict[str, torch.Tensor]]:
    """The alphas and the last supernet of a search that has ended."""
    finished = load_alphas(source)
    path = source / f"supernet-stage{config.stages}.safetensors"
    if len(finished) < config.stages or not path.is_file():
        raise UsageError(
            f"{source}: the search has not ended (no {path.name}); "
            f"pdarts-fast search --resume --run-dir {source} goes on with it"
        )
    try:
        return finished, load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error


def _within_targets(
    config: SearchConfig,
    device: torch.device,
    costs: Costs | None,
    genotype: Genotype,
    finished: Sequence[Alphas],
) -> tuple[Genotype, dict[str, Any]]:
    """The genotype repaired to the targets of the search, if it has any."""
    strategy = make_strategy(config, device, costs)
    if not isinstance(strategy, RapDarts):
        return genotype, {}
    fixed, swaps = strategy.repaired(genotype, config.max_skips, log_probabilities(finished))
    return fixed, strategy.facts(fixed, swaps)


def _description(
    config: SearchConfig,
    dataset: Dataset,
    source: Path,
    device: torch.device,
    backend: str,
    ranks: Ranks,
) -> dict[str, Any]:
    epochs = str(config.perturbation_epochs)
    command = shlex.join(["pdarts-fast", "select", str(source), "--epochs", epochs])
    values = description(
        config, command, dataset.facts(config.dataset), hardware(device, backend, ranks.size)
    )
    return values | {"kind": SELECTION}
