"""Whole searches on digits in seconds, in this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdarts_fast import run_search, run_select
from pdarts_fast.config import SearchConfig, preset
from pdarts_fast.data import Dataset
from pdarts_fast.data.digits import load_digits
from pdarts_fast.flags import gathered, parse, run_defaults

TINY = (
    "--preset demo --image-size 8 --crop-padding 1 --channels 2 --epochs 2 --warmup-epochs 1 "
    "--batch-size 24 --validation-epochs 1 --log-interval 100 --device cpu --backend auto"
)
STAGES = "--cells 3 3 3 --skip-dropout 0 0.3 0.5"
OPP = "--strategy opp --cells 3 --epochs 8 --warmup-epochs 0 --checkpoint-interval 1"
SELECT = "--cells 3 3 --ops-kept 8 3 --skip-dropout 0.2 --checkpoint-interval 1"
IMAGES = 96


def settings(*words: Any) -> SearchConfig:
    """The settings of ``pdarts-fast search WORDS``."""
    arguments = gathered([str(word) for word in words], "--target")
    default = run_defaults(arguments, preset, ["strategy"])
    return parse(SearchConfig, "search", arguments, default)


@cache
def few_digits(image_size: int) -> Dataset:
    """The first digits of the training set."""
    whole = load_digits(image_size)
    part = dataclasses.replace(
        whole.train, images=whole.train.images[:IMAGES], labels=whole.train.labels[:IMAGES]
    )
    return dataclasses.replace(whole, train=part)


@contextmanager
def bare() -> Iterator[None]:
    """Few images, and neither drawings nor reports, which take longer than a tiny search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_search, run_select):
            patch.setattr(
                module, "load_dataset", lambda *a, image_size, **k: few_digits(image_size)
            )
            patch.setattr(module, "draw_genotype", lambda *a: None)
            patch.setattr(module, "write_report", lambda path, **k: path)
        yield
    torch.set_num_threads(threads)


def run_tiny(path: Path, flags: tuple[Any, ...], stages: str) -> Path:
    """Runs a tiny search; returns its run directory."""
    words = [*TINY.split(), *stages.split(), "--run-dir", path, *flags]
    with bare():
        return run_search.run_search(settings(*words))


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Path]:
    """Runs a tiny search with further flags in a folder of this test; returns the folder."""

    def run(name: str, *flags: Any, stages: str = STAGES) -> Path:
        return run_tiny(tmp_path / name, flags, stages)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny search with further flags, made once for all tests: its folder is to be read only."""
    made: dict[Any, Path] = {}

    def run(*flags: Any, stages: str = STAGES) -> Path:
        key = (*map(str, flags), stages)
        if key not in made:
            made[key] = run_tiny(tmp_path_factory.mktemp("finished") / "run", flags, stages)
        return made[key]

    return run


@pytest.fixture
def few_images() -> Iterator[None]:
    """What tiny searches run with, for commands that a test starts itself."""
    with bare():
        yield


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def genotype_file(run: Path) -> dict[str, Any]:
    """The content of genotype.json."""
    return json.loads((run / "genotype.json").read_text())


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The helpers of this file: test modules cannot import one another."""
    return SimpleNamespace(
        settings=settings,
        records=records,
        genotype_file=genotype_file,
        few_digits=few_digits,
        TINY=TINY,
        STAGES=STAGES,
        OPP=OPP,
        SELECT=SELECT,
    )
