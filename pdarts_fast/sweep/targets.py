"""Targets of the runs of a sweep: whether they can be met, and whether a cell meets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pdarts_fast.config import SearchConfig
from pdarts_fast.cost import Cost
from pdarts_fast.data.datasets import class_count
from pdarts_fast.errors import UsageError
from pdarts_fast.run.setup import pick_device
from pdarts_fast.settings import from_json
from pdarts_fast.strategies.rapdarts import make_costs
from pdarts_fast.strategies.targets import LATENCY, MACS, PARAMS, parse_target, parse_targets
from pdarts_fast.sweep.plan import PlannedRun

# What the cost of a cell follows from, beside its run directory.
_DECISIVE = ("target", "preset", "dataset", "data", "image_size", "max_skips", "device", "threads")


def check_targets(
    runs: Sequence[PlannedRun], run_dir: Callable[[PlannedRun], Path], *, on_ray: bool
) -> None:
    """Raise `UsageError` if no cell can meet the targets of a run.

    Args:
        runs: Of a sweep; their settings are valid.
        run_dir: Folder of a run: latencies that it has measured before are read from there.
        on_ray: The runs see other machines than this one, so that their latency is not known.
    """
    seen: set[tuple[Any, ...]] = set()
    for run in runs:
        config = from_json(run.settings, SearchConfig(), "plan.json")
        key = tuple(getattr(config, name) for name in _DECISIVE)
        if not config.target or key in seen:
            continue
        seen.add(key)
        folder: Path | None = run_dir(run)
        if on_ray:
            counted = (t for t in config.target if parse_target(t).resource != LATENCY)
            config, folder = dataclasses.replace(config, target=tuple(counted)), None
        device = torch.device("cpu") if on_ray else pick_device(config.device)
        classes = class_count(config.dataset, config.data)
        try:
            with _threads(config.threads):
                make_costs(config, classes, device, folder)
        except UsageError as error:
            setting = " ".join(run.setting)
            raise UsageError(f"--vary {setting}: {error}" if setting else str(error)) from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Measures latency with the threads that a run has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def meets_targets(texts: Sequence[str], cost: Cost, result: Mapping[str, Any]) -> bool | None:
    """Whether a derived cell costs at most what its search was told.

    Args:
        texts: Values of ``--target``; none are always met.
        cost: Of the derived network, counted here.
        result: Content of genotype.json; its entry ``costs``, resource to number, has what the
            search measured and cannot be counted (latency).

    Returns:
        None if a target is on something whose cost is not known.
    """
    recorded = result.get("costs")
    known: dict[str, float] = dict(recorded) if isinstance(recorded, dict) else {}
    known |= {PARAMS: cost.parameters, MACS: cost.multiply_adds}
    unknown = False
    for target in parse_targets(texts):
        if target.resource not in known:
            unknown = True
        elif known[target.resource] > target.limit:
            return False
    return None if unknown else True
