"""Whole searches and trainings from captured steps, and when they read from the device."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdarts_fast import cli, run_search, run_train, search, training
from pdarts_fast.capture.trace import TraceCapture
from pdarts_fast.supernet import Network
from pdarts_fast.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread", "quick_traces")
Run = Callable[..., Path]

TRAIN = (
    "train --genotype PDARTS --preset demo --cells 3 --channels 2 --epochs 2 --batch-size 5 "
    "--image-size 8 --drop-path 0.3 --log-interval 2 --device cpu --threads 1"
)


@pytest.fixture
def run_tiny(
    tiny: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Runs a tiny search or training in this process, with quick stand-ins for what is drawn."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "search_process"))
    toys = importlib.import_module("toy_network")
    monkeypatch.setattr(search, "Network", toys.ToyNetwork)
    for module in (run_search, run_train):
        monkeypatch.setattr(module, "draw_genotype", lambda *_: None)
    monkeypatch.setattr(run_search, "write_report", lambda path, **_: path)
    monkeypatch.setattr(run_train, "write_train_report", lambda path: path)

    def run(command: str, *flags: Any, capture: TraceCapture | None = None) -> Path:
        folder = tmp_path / f"{command}-{len(list(tmp_path.iterdir()))}"
        for module in (search, training):
            monkeypatch.setattr(module, "cuda_capture", lambda *_: capture)
        arguments = (
            tiny(folder) if command == "search" else [*TRAIN.split(), "--run-dir", str(folder)]
        )
        if command == "train":
            arguments += ["--dataset", "image-folder", "--data", str(images)]
        assert cli.main([*arguments, *map(str, flags)]) == 0
        return folder

    yield run
    sys.modules.pop("toy_network", None)


class Watched(TraceCapture):
    """Counts recordings over all stages."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0
        self.released = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return super().record(function)

    def release(self) -> None:
        self.released += 1
        super().release()


def test_a_search_from_traces_ends_as_an_eager_one(
    run_tiny: Run, outcome: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = Watched()
    eager, traced = run_tiny("search"), run_tiny("search", capture=capture)
    assert outcome(traced) == outcome(eager)
    # In each stage: weights alone and after alphas, full batches and the smaller last one.
    assert (capture.recorded, capture.released) == (12, 3)
    assert capsys.readouterr().out.count("; outside the steps ") == 2


def test_operations_are_added_under_the_recorded_steps(
    run_tiny: Run, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "Network", Network)
    flags = ("--strategy", "opp", "--cells", 3, "--ops-kept", 8, "--skip-dropout", 0)
    flags = (*flags, "--epochs", 8, "--op-interval", 1, "--warmup-epochs", 0)
    capture = Watched()
    eager = run_tiny("search", *flags)
    traced = run_tiny("search", *flags, capture=capture)
    assert outcome(traced) == outcome(eager)
    added = [r["operation"] for r in outcome(traced)["metrics"] if r["kind"] == "operation"]
    assert len(added) == 8
    # For full batches and the smaller last one: not once more an addition.
    assert (capture.recorded, capture.released) == (2, 1)


def test_a_training_from_traces_ends_as_an_eager_one(
    run_tiny: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = functools.partial(TrainStep, tensor_drop_path=True)
    monkeypatch.setattr(training, "TrainStep", make)
    capture = Watched()
    folders = [run_tiny("train"), run_tiny("train", capture=capture)]
    losses = []
    for folder in folders:
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([r["train_loss"] for r in records if r["kind"] == "epoch"])
    assert losses[0] == losses[1]
    assert capture.recorded == 2
    assert capsys.readouterr().out.count("; outside the steps ") == 2


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
# What may wait for the device: all but the steps between two log intervals.
WAITING = {
    search.Search: ("_build_stage", "_log_interval", "_save", "_end_epoch", "_end_stage"),
    training.Training: ("_build", "_log_interval", "_save", "_end_epoch"),
    # Asked before a checkpoint is written.
    search.SearchStep: ("bad_step",),
    TrainStep: ("bad_step",),
}  # fmt: skip


@pytest.mark.usefixtures("fused_optimizers")
@pytest.mark.parametrize("command", ["search", "train"])
def test_nothing_is_read_between_log_intervals(
    command: str, run_tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, forbidden = [], []
    depth = [0]

    def enters(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return wrapper

    def reads(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: torch.Tensor, *args: Any) -> Any:
            (allowed if depth[0] else forbidden).append(name)
            return function(self, *args)

        return wrapper

    for owner, names in WAITING.items():
        for name in names:
            monkeypatch.setattr(owner, name, enters(getattr(owner, name)))
    # Reading images and labels from files is no reading from the device.
    for module, name in ((run_search, "load_dataset"), (run_train, "open_data")):
        monkeypatch.setattr(module, name, enters(getattr(module, name)))
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, reads(name, getattr(torch.Tensor, name)))
    run_tiny(command)
    assert "tolist" in allowed
    assert forbidden == []
