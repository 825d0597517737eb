"""Presets of the strategies, and which settings go together. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdarts_fast.errors import UsageError
from pdarts_fast.strategies.targets import parse_targets

if TYPE_CHECKING:
    from pdarts_fast.config import SearchConfig

STRATEGIES = ("pdarts", "opp", "rapdarts")

# Ops that OPP-DARTS adds after the first one, skip_connect included.
OPP_ADDITIONS = 7

_OPP = {
    "cells": (8,),
    "ops_kept": (8,),
    "channels": (16,),
    "skip_dropout": (0.0,),
    "max_skips": 8,
    "epochs": 50,
    "warmup_epochs": 0,
    "batch_size": 64,
    "lr_min": 0.001,
    "alpha_lr": 3e-4,
}
# Strategy -> preset -> what differs from the P-DARTS preset of that name.
# Source: arXiv 2302.05632, section 4 (opp); arXiv 1911.05704, section 4 (rapdarts).
STRATEGY_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "pdarts": {},
    "opp": {
        "cifar10": _OPP,
        "cifar100": _OPP,
        "demo": {
            **_OPP,
            "cells": (4,),
            "channels": (8,),
            "epochs": 12,
            "op_interval": 1,
            "alpha_lr": 3e-3,
        },
    },
    "rapdarts": {
        "cifar10": {"target": ("params=3.0M",)},
        "cifar100": {"target": ("params=3.0M",)},
        "demo": {"target": ("params=60k",)},
    },
}


def check_strategy(config: SearchConfig) -> None:
    """Raise `UsageError` if settings of the strategy do not go together; says why."""
    targets = parse_targets(config.target)
    if len(config.target_weight) not in (1, max(1, len(targets))):
        raise UsageError(
            f"--target-weight has {len(config.target_weight)} values but --target has "
            f"{len(targets)}: give one for each target, or one for all"
        )
    if config.strategy == "rapdarts" and not targets:
        raise UsageError(
            "--strategy rapdarts needs --target RESOURCE=LIMIT, like params=3.0M; without a target "
            "it is --strategy pdarts"
        )
    if config.strategy == "opp":
        _check_opp(config)
    elif config.op_interval != type(config).op_interval:
        raise UsageError(
            f"--op-interval {config.op_interval}: only --strategy opp adds operations; leave it out"
        )
    unused = config.perturbation_epochs != type(config).perturbation_epochs
    if config.select != "perturbation" and unused:
        raise UsageError(
            f"--perturbation-epochs {config.perturbation_epochs} has no effect without "
            "--select perturbation"
        )


def _check_opp(config: SearchConfig) -> None:
    if config.stages != 1 or config.ops_kept != (8,):
        raise UsageError(
            "--strategy opp has one stage of constant depth that ends with all 8 ops: give one "
            "value of --cells and leave --ops-kept at 8"
        )
    if any(config.skip_dropout):
        raise UsageError(
            "--strategy opp has no skip dropout (skip_connect comes last instead): leave "
            "--skip-dropout at 0"
        )
    if config.target:
        raise UsageError(
            "--target does not go with --strategy opp: its ops come one at a time, so there is no "
            "cheaper op to move to for most of the search; use --strategy rapdarts"
        )
    if config.sample == "dirichlet":
        raise UsageError(
            "--sample dirichlet does not go with --strategy opp: its trials compare losses of "
            "supernets, which sampled weights would drown in noise; use --strategy pdarts"
        )
    last = OPP_ADDITIONS * config.op_interval
    if config.epochs <= last:
        raise UsageError(
            f"--epochs {config.epochs} ends before the last operation comes at epoch {last} "
            f"({OPP_ADDITIONS} additions, --op-interval {config.op_interval}): give more epochs "
            "or a smaller --op-interval"
        )
