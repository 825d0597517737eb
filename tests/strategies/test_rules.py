"""Presets of the strategies, and combinations that make no sense."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.cli import main
from pdarts_fast.config import differing, preset, to_json, validate
from pdarts_fast.errors import UsageError
from pdarts_fast.run_search import search_command

OPP_PAPER = {
    "cells": (8,), "ops_kept": (8,), "channels": (16,), "epochs": 50, "warmup_epochs": 0,
    "batch_size": 64, "lr": 0.025, "lr_min": 0.001, "momentum": 0.9, "weight_decay": 3e-4,
    "grad_clip": 5.0, "alpha_lr": 3e-4, "alpha_betas": (0.5, 0.999), "alpha_weight_decay": 1e-3,
    "skip_dropout": (0.0,), "max_skips": 8, "op_interval": 2, "dataset": "cifar10",
}  # fmt: skip


def test_presets_have_the_numbers_of_the_papers() -> None:
    config = preset("cifar10", "opp")
    assert {name: getattr(config, name) for name in OPP_PAPER} == OPP_PAPER
    config = preset("cifar10", "rapdarts")
    assert config.target == ("params=3.0M",)
    assert config.target_weight == (1.0,)
    assert differing(to_json(preset("cifar10")), config) == [
        "--strategy (pdarts, now rapdarts)",
        "--target ([], now ['params=3.0M'])",
    ]


@pytest.mark.parametrize("strategy", ["pdarts", "opp", "rapdarts"])
def test_every_demo_needs_no_files(strategy: str) -> None:
    config = validate(preset("demo", strategy))
    assert (config.dataset, config.data) == ("digits", None)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(UsageError, match="--strategy: 'darts' is not one of pdarts, opp, rapdarts"):
        preset("demo", "darts")


def test_flags_and_files_choose_the_strategys_preset(tools: Any, tmp_path: Path) -> None:
    config = tools.settings("--preset", "demo", "--strategy", "opp", "--epochs", 9)
    assert (config.cells, config.epochs, config.max_skips) == ((4,), 9, 8)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"preset": "demo", "strategy": "rapdarts", "target": ["macs=1M"]}))
    config = tools.settings("--config", file)
    assert (config.strategy, config.target) == ("rapdarts", ("macs=1M",))


@pytest.mark.parametrize(
    "flags",
    [
        "--target params=3.0M --target latency=12ms",
        "--target params=3.0M latency=12ms",
        "--target=params=3.0M --target=latency=12ms",
    ],
    ids=["repeated", "together", "equals"],
)
def test_targets_may_be_repeated(flags: str, tools: Any) -> None:
    config = tools.settings("--strategy", "rapdarts", *flags.split(), "--seed", 3)
    assert config.target == ("params=3.0M", "latency=12ms")
    assert config.seed == 3


@pytest.mark.parametrize(
    "flags",
    [
        "--strategy opp --epochs 20",
        "--strategy rapdarts --target macs=3M params=1M --target-weight 1 2",
        "--beta-decay 2 --sample dirichlet --select perturbation",
    ],
    ids=["opp", "rapdarts", "remedies"],
)
def test_the_command_of_a_run_gives_its_settings(flags: str, tools: Any) -> None:
    config = tools.settings("--preset", "demo", *flags.split())
    words = shlex.split(search_command(config))
    assert words[:2] == ["pdarts-fast", "search"]
    assert tools.settings(*words[2:]) == config


def test_a_run_of_a_version_without_strategies_is_one_of_pdarts(tools: Any) -> None:
    new = ("strategy", "target", "target_weight", "beta_decay", "sample", "select",
           "perturbation_epochs", "op_interval")  # fmt: skip
    saved = {k: v for k, v in to_json(preset("demo")).items() if k not in new}
    assert differing(saved, preset("demo")) == []
    assert differing(saved, tools.settings("--preset", "demo", "--beta-decay", 1)) == [
        "--beta-decay (0.0, now 1.0)"
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--strategy darts", "--strategy: 'darts' is not one of"),
        ("--strategy rapdarts --target", "--strategy rapdarts needs --target"),
        ("--target params", "--target params: wanted RESOURCE=LIMIT"),
        ("--target params=1M --target params=2M", "--target params: is given 2 times"),
        (
            "--target params=1M --target-weight 1 2",
            "--target-weight has 2 values but --target has 1",
        ),
        ("--target params=1M --target-weight -1", "--target-weight -1.0"),
        (
            "--target params=1k",
            "--target cannot be met: params=1.000 k but the cheapest cell needs",
        ),
        ("--strategy opp --cells 5 11", "--strategy opp has one stage"),
        ("--strategy opp --skip-dropout 0.3", "--strategy opp has no skip dropout"),
        ("--strategy opp --target params=1M", "--target does not go with --strategy opp"),
        ("--strategy opp --sample dirichlet", "--sample dirichlet does not go with --strategy opp"),
        ("--strategy opp --epochs 7", "--epochs 7 ends before the last operation comes at epoch 7"),
        ("--strategy opp --op-interval 2", "--epochs 12 ends before the last operation"),
        ("--op-interval 3", "--op-interval 3: only --strategy opp adds operations"),
        ("--perturbation-epochs 2", "has no effect without --select perturbation"),
        ("--beta-decay -1", "--beta-decay -1.0"),
        ("--sample gumbel", "--sample"),
        ("--select best", "--select"),
    ],
    ids=lambda value: value.replace(" ", "_") if "--" in value else "",
)
def test_senseless_combinations_are_refused_with_the_reason(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--preset", "demo", *flags.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("pdarts-fast: error: ")]
    assert errors == lines[-1:]
    assert message in errors[0]
    assert not list(tmp_path.iterdir())
