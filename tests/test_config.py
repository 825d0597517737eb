"""Settings of a search: presets, files, flags, and every value that is refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdarts_fast.cli import main
from pdarts_fast.config import SearchConfig, differing, preset, to_json, validate
from pdarts_fast.errors import UsageError
from pdarts_fast.flags import parse, run_defaults
from pdarts_fast.run_search import search_command


def read(*arguments: str) -> SearchConfig:
    """The settings of ``pdarts-fast search arguments``."""
    return parse(SearchConfig, "search", arguments, run_defaults(arguments, preset))


PAPER = {
    "dataset": "cifar10",
    "cells": (5, 11, 17),
    "ops_kept": (8, 5, 3),
    "channels": (16, 16, 16),
    "skip_dropout": (0.0, 0.4, 0.7),
    "skip_dropout_decay": 0.2,
    "max_skips": 2,
    "epochs": 25,
    "warmup_epochs": 10,
    "validation_epochs": 4,
    "batch_size": 96,
    "data_split": 0.5,
    "lr": 0.025,
    "lr_min": 0.0,
    "lr_schedule": "paper",
    "momentum": 0.9,
    "weight_decay": 3e-4,
    "grad_clip": 5.0,
    "alpha_lr": 6e-4,
    "alpha_betas": (0.5, 0.999),
    "alpha_weight_decay": 1e-3,
    "image_size": 32,
    "crop_padding": 4,
    "flip": True,
    "cutout": 0,
    "amp": False,
}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("cifar10", {}),
        ("cifar100", {"dataset": "cifar100", "skip_dropout": (0.1, 0.2, 0.3)}),
    ],
    ids=["cifar10", "cifar100"],
)
def test_presets_have_the_numbers_of_the_paper(name: str, changed: dict[str, Any]) -> None:
    config = preset(name)
    for field, value in (PAPER | changed).items():
        assert getattr(config, field) == value, field


def test_demo_needs_no_files_and_differs_only_where_it_says() -> None:
    config = validate(preset("demo"))
    assert config.dataset == "digits"
    assert config.data is None
    assert config.stages == 3
    assert config.ops_kept == (8, 5, 3)


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="--preset: 'imagenet' is not one of cifar10, cifar100"):
        preset("imagenet")


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 7, "batch-size": 32, "lr": 1, "alpha_betas": [0.4, 0.9]}))
    config = read("--preset", "demo", "--config", str(file), "--epochs", "9")
    assert (config.epochs, config.batch_size, config.dataset) == (9, 32, "digits")
    assert config.lr == 1.0
    assert isinstance(config.lr, float)
    assert config.alpha_betas == (0.4, 0.9)
    assert read("--config", str(file)).dataset == "cifar10"


def test_the_preset_in_a_file_is_the_base_unless_a_flag_names_one(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"preset": "demo", "epochs": 7}))
    config = read("--config", str(file))
    assert (config.preset, config.dataset, config.epochs) == ("demo", "digits", 7)
    config = read("--config", str(file), "--preset", "cifar100")
    assert (config.preset, config.dataset, config.epochs) == ("cifar100", "cifar100", 7)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that holds the config.json of a search."""
    flags = "--preset demo --epochs 5 --overwrite --run-dir somewhere --no-checksum"
    config = read(*flags.split())
    (tmp_path / "config.json").write_text(json.dumps({"config": to_json(config), "versions": {}}))
    return tmp_path


def test_config_of_a_run_is_a_settings_file_without_what_belongs_to_that_run(run: Path) -> None:
    config = read("--config", str(run / "config.json"), "--seed", "3")
    assert (config.preset, config.epochs, config.seed, config.checksum) == ("demo", 5, 3, False)
    assert config.run_dir is None
    assert not config.overwrite


@pytest.mark.parametrize("spelling", ["--run-dir", "--run_dir"])
def test_resume_takes_the_saved_settings(run: Path, spelling: str) -> None:
    config = read("--resume", spelling, str(run), "--workers", "7")
    assert (config.preset, config.epochs, config.workers) == ("demo", 5, 7)
    assert config.resume
    assert not config.overwrite
    assert config.run_dir == run
    validate(config)


def test_resume_with_a_preset_does_not_take_the_saved_settings(run: Path) -> None:
    config = read("--resume", "--run-dir", str(run), "--preset", "demo")
    saved = json.loads((run / "config.json").read_text())["config"]
    assert differing(saved, config) == ["--epochs (5, now 4)"]


def test_differing_ignores_what_does_not_change_the_result() -> None:
    saved = to_json(preset("demo"))
    same = read(
        "--preset", "demo", "--workers", "9", "--log-interval", "1", "--backend", "reference"
    )
    assert differing(saved, same) == []
    other = read("--preset", "demo", "--cells", "3", "3", "3", "--amp")
    assert differing(saved, other) == [
        "--amp (False, now True)",
        "--cells ([3, 4, 5], now [3, 3, 3])",
    ]


def test_both_spellings_of_a_flag_work() -> None:
    config = read("--batch_size", "8", "--skip-dropout", "0.1", "--ops_kept", "8", "5", "3")
    assert (config.batch_size, config.skip_dropout, config.ops_kept) == (8, (0.1,), (8, 5, 3))


def test_one_value_counts_for_every_stage() -> None:
    config = validate(read("--preset", "demo", "--channels", "2", "--skip-dropout", "0.5"))
    assert config.channels == (2, 2, 2)
    assert config.skip_dropout == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cells", "--cells is empty"),
        ("--cells 3 3", "--ops-kept has 3 values but --cells has 2"),
        ("--cells 2 3 3", "--cells 2: wanted a value from 3"),
        ("--channels 1 2", "--channels has 2 values but --cells has 3"),
        ("--channels 0", "--channels 0"),
        ("--skip-dropout 0 1 0", "--skip-dropout 1.0"),
        ("--skip-dropout -0.1", "--skip-dropout -0.1"),
        ("--skip-dropout-decay -1", "--skip-dropout-decay -1.0"),
        ("--ops-kept 7 5 3", "--ops-kept starts with 7"),
        ("--ops-kept 8 3 5", "--ops-kept 8 3 5: values may not grow"),
        ("--ops-kept 8 5 1", "--ops-kept 8 5 1"),
        ("--max-skips 9", "--max-skips 9"),
        ("--max-skips -1", "--max-skips -1"),
        ("--epochs 0", "--epochs 0"),
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs 2 leaves no epoch of --epochs 2"),
        ("--warmup-epochs -1", "--warmup-epochs -1"),
        ("--validation-epochs -1", "--validation-epochs -1"),
        ("--batch-size 1", "--batch-size 1"),
        ("--data-split 0", "--data-split 0.0"),
        ("--data-split 1", "--data-split 1.0"),
        ("--data-split nan", "--data-split nan"),
        ("--lr 0", "--lr 0.0"),
        ("--lr inf", "--lr inf"),
        ("--lr nan", "--lr nan"),
        ("--lr-min 0.5", "--lr-min 0.5 is larger than --lr 0.025"),
        ("--momentum 1", "--momentum 1.0"),
        ("--weight-decay -1", "--weight-decay -1.0"),
        ("--grad-clip 0", "--grad-clip 0.0"),
        ("--alpha-lr 0", "--alpha-lr 0.0"),
        ("--alpha-betas 0.5 1", "--alpha-betas 1.0"),
        ("--alpha-betas 0.5", "--alpha-betas"),
        ("--alpha-weight-decay -1", "--alpha-weight-decay -1.0"),
        ("--crop-padding -1", "--crop-padding -1"),
        ("--crop-padding 32", "--crop-padding 32 would crop whole images"),
        ("--image-size 32 --cutout 32", "--cutout 32 would erase whole images of --image-size 32"),
        ("--image-size 4 --crop-padding 1", "--image-size 4"),
        ("--seed -1", "--seed -1"),
        ("--threads 0", "--threads 0"),
        ("--workers -1", "--workers -1"),
        ("--log-interval 0", "--log-interval 0"),
        ("--checkpoint-interval -1", "--checkpoint-interval -1"),
        ("--device tpu", "--device: 'tpu' is not auto, cpu, cuda or cuda:N"),
        ("--device cuda:x", "--device: 'cuda:x'"),
        ("--device cuda:²", "--device: 'cuda:²'"),
        ("--backend fast", "--backend"),
        ("--lr-schedule linear", "--lr-schedule"),
        ("--dataset mnist", "--dataset"),
        ("--preset imagenet", "--preset"),
        ("--dataset cifar10", "--dataset cifar10 needs --data DIR"),
        ("--dataset image-folder", "--dataset image-folder needs --data DIR"),
        ("--download", "--download works for cifar10 and cifar100, not for digits"),
        ("--resume", "--resume needs --run-dir DIR"),
        ("--resume --overwrite --run-dir {tmp}/run", "--resume and --overwrite exclude each other"),
        ("--epochs three", "Error parsing --epochs"),
        ("--epochs", "Missing value for argument '--epochs'"),
        ("--config", "Missing value for argument '--config'"),
        ("--run-dir", "Missing value for argument '--run-dir'"),
        ("--epoch 3", "Unrecognized options: --epoch"),
        ("--config {tmp}/missing.json", "/missing.json: No such file or directory"),
    ],
    ids=lambda value: value.replace("{tmp}/", "").replace(" ", "_") if "--" in value else "",
)
def test_senseless_flags_are_refused_in_one_line_before_any_work(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pdarts_fast.run_search.load_dataset", lambda *a, **k: pytest.fail("work"))
    arguments = flags.format(tmp=tmp_path).split()
    assert main(["search", "--preset", "demo", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pdarts-fast: error: ")
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "wanted a JSON object"),
        ('{"epoch": 3}', "unknown setting 'epoch'; pdarts-fast search --help lists them"),
        ('{"epochs": "3"}', "epochs is '3', wanted int"),
        ('{"epochs": 3.5}', "epochs is 3.5, wanted int"),
        ('{"epochs": true}', "epochs is True, wanted int"),
        ('{"cells": 5}', "cells is 5, wanted tuple"),
        ('{"cells": [5.5]}', "cells is [5.5], wanted tuple"),
        ('{"alpha_betas": [0.5]}', "alpha_betas is [0.5], wanted tuple"),
        ('{"alpha_betas": [0.5, "x"]}', "alpha_betas"),
        ('{"lr": "fast"}', "lr is 'fast', wanted float"),
        ('{"lr": 1' + "0" * 400 + "}", "lr is 1"),
        ('{"epochs": 1' + "0" * 400 + "}", "--epochs 1"),
        ('{"lr": NaN}', "--lr nan"),
        ('{"amp": 1}', "amp is 1, wanted bool"),
        ('{"data": 3}', "data is 3, wanted Path"),
        ('{"dataset": 3}', "dataset is 3"),
        ('{"dataset": "mnist"}', "--dataset: 'mnist' is not one of"),
        ('{"preset": ["demo"]}', "--preset"),
        ('{"threads": "two"}', "threads is 'two'"),
        ('{"cells": []}', "--cells is empty"),
        ('{"ops_kept": []}', "--ops-kept has 0 values"),
        ('{"device": "cuda:1000"}', "--device: 'cuda:1000'"),
    ],
    ids=lambda text: text[:24],
)
def test_bad_settings_files_are_refused_in_one_line(
    content: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pdarts_fast.run_search.load_dataset", lambda *a, **k: pytest.fail("work"))
    file = tmp_path / "settings.json"
    file.write_text(content)
    assert main(["search", "--config", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pdarts-fast: error: ")
    assert message in lines[0]


floats = st.floats(0.01, 0.9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["cifar10", "cifar100", "demo"]),
    values=st.fixed_dictionaries(
        {},
        optional={
            "data": st.sampled_from([Path("a b"), Path("/x/'y'")]),
            "run_dir": st.just(Path("runs/$HOME")),
            "epochs": st.integers(20, 30),
            "cells": st.lists(st.integers(3, 20), min_size=1, max_size=4).map(tuple),
            "skip_dropout": st.lists(floats, min_size=1, max_size=4).map(tuple),
            "alpha_betas": st.tuples(floats, floats),
            "lr": floats,
            "weight_decay": st.just(1e-05),
            "flip": st.booleans(),
            "amp": st.booleans(),
            "checksum": st.booleans(),
            "threads": st.integers(1, 4),
            "lr_schedule": st.just("reference"),
            "device": st.just("cuda:1"),
        },
    ),
)
def test_the_command_of_a_configuration_gives_that_configuration(
    name: str, values: dict[str, Any]
) -> None:
    config = dataclasses.replace(preset(name), **values)
    words = shlex.split(search_command(config))
    assert words[:2] == ["pdarts-fast", "search"]
    assert read(*words[2:]) == config
