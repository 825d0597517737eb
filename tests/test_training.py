"""Training runs: records, weights, and resuming bit for bit after being killed or stopped."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pdarts_fast.genotype import Genotype, save_genotype
from pdarts_fast.run.checkpoint import CheckpointFolder
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.train_schedule import drop_path, learning_rate

EPOCHS, STEPS = 2, 6
# One node a cell: quick, and with everything that matters to resuming.
SMALL_CELL = Genotype(
    [("sep_conv_3x3", 0), ("skip_connect", 1)], [2], [("max_pool_3x3", 0), ("skip_connect", 1)], [2]
)
TINY = (
    "--dataset image-folder --image-size 8 --cells 3 --channels 2 "
    "--no-auxiliary --cutout 2 --epochs 2 --batch-size 5 --drop-path 0.4 --log-interval 4 "
    "--threads 1 --device cpu --checkpoint-interval 1 --workers 1 --label-smoothing 0.1"
)
LINE = "pdarts_fast.run.files:JsonLines.write"
STEP = "pdarts_fast.train_step:TrainStep.run"
PLACES = [
    "os:replace",
    LINE,
    STEP,
    "pdarts_fast.training:score",
    "pdarts_fast.training:save_weights",
    "pdarts_fast.run_train:draw_genotype",
]
TIMING = ("seconds", "overhead_seconds", "images_per_second", "peak_memory_mib")

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def tiny_train(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Makes the command line of a training of a second; later flags win over its own."""
    genotype = tmp_path_factory.mktemp("genotype") / "small.json"
    save_genotype(genotype, SMALL_CELL)
    own = ["--genotype", str(genotype), "--data", str(images), *TINY.split()]
    return lambda run, *flags: ["train", "--run-dir", str(run), *own, *map(str, flags)]


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a run that has to be the same when it is resumed."""
    state = CheckpointFolder(run / "checkpoints").load()
    assert state is not None
    state["training"]["network"] = {k: v.tolist() for k, v in state["training"]["network"].items()}
    buffers = state["training"]["optimizer"]["state"].values()
    return {
        "metrics": records(run),
        "best": (run / "weights-best.safetensors").read_bytes(),
        "last": (run / "weights-last.safetensors").read_bytes(),
        "network": state["training"]["network"],
        "momentum": [buffer["momentum_buffer"].tolist() for buffer in buffers],
        "random": state["random"]["torch"].tolist(),
        "best accuracy": state["progress"]["best_accuracy"],
        "genotype": (run / "genotype.json").read_text(),
    }


@pytest.fixture(scope="module")
def whole(
    processes: Any, tiny_train: Command, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """An uninterrupted run: its folder, what it ends in, how often it passes every place."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = processes.run(tiny_train(run), counts=PLACES)
    assert process.status == 0, process.stderr
    return {"run": run, "outcome": outcome(run), "counts": process.counts}


def test_records_of_a_run(whole: dict[str, Any]) -> None:
    lines = records(whole["run"])
    kinds = ["interval", "interval", "epoch", "validation"] * EPOCHS
    assert [line["kind"] for line in lines] == kinds
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [6, 12]
    config = argparse_config(whole["run"])
    for line in lines:
        if line["kind"] != "validation":
            assert line["lr"] == pytest.approx(learning_rate(config, line["epoch"]))
            assert line["drop_path"] == pytest.approx(drop_path(config, line["epoch"]))
    validations = [line for line in lines if line["kind"] == "validation"]
    assert all(line["images"] == 6 and line["top5_accuracy"] == 1.0 for line in validations)
    intervals = [line for line in lines if line["kind"] == "interval"][:2]
    epoch = lines[2]
    weighted = (4 * 5 * intervals[0]["loss"] + 7 * intervals[1]["loss"]) / 27
    assert epoch["train_loss"] == pytest.approx(weighted)


def argparse_config(run: Path) -> Any:
    from pdarts_fast.settings import from_json
    from pdarts_fast.train_config import TrainConfig

    saved = json.loads((run / "config.json").read_text())
    return from_json(saved["config"], TrainConfig(), "config.json")


def test_config_json_describes_the_run(whole: dict[str, Any]) -> None:
    saved = json.loads((whole["run"] / "config.json").read_text())
    assert saved["kind"] == "train"
    assert saved["command"].startswith("pdarts-fast train --preset cifar10 --genotype ")
    assert "--no-auxiliary" in saved["command"]
    assert saved["dataset"]["train_images"] == 27
    assert saved["network"]["parameters"] > 0
    assert not (whole["run"] / "alphas.jsonl").exists()


def test_weights_tell_their_epoch_and_accuracy(whole: dict[str, Any]) -> None:
    accuracies = [r["accuracy"] for r in records(whole["run"]) if r["kind"] == "validation"]
    for which, epoch in (("last", EPOCHS - 1), ("best", accuracies.index(max(accuracies)))):
        with safe_open(whole["run"] / f"weights-{which}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["pdarts_fast"])
        assert (facts["epoch"], facts["accuracy"]) == (epoch, accuracies[epoch])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.partition(":")[2])
def test_killed_at_random_calls_of_every_kind_and_resumed(
    place: str, when: str, whole: Any, processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    calls = whole["counts"][place]
    rng = random.Random(f"{place} {when}")
    for call in rng.sample(range(1, calls + 1), min(calls, 2 if when == "before" else 1)):
        run = tmp_path / f"run-{call}"
        process = processes.run(tiny_train(run), kill=(place, call, when))
        assert process.status == -signal.SIGKILL, process.stderr
        resumed = processes.run(tiny_train(run, "--resume"))
        assert resumed.status == 0, f"call {call}: {resumed.stderr}"
        assert outcome(run) == whole["outcome"], f"call {call}"


def test_killed_between_checkpoints_it_repeats_the_steps_since(
    whole: Any, processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--checkpoint-interval", 4)
    # Its last checkpoint is that of step 4 of the second epoch.
    assert processes.run(tiny_train(run, *flags), kill=(STEP, 12, "before")).status < 0
    resumed = processes.run(tiny_train(run, "--resume", *flags), counts=[STEP])
    assert resumed.status == 0, resumed.stderr
    assert resumed.counts[STEP] == EPOCHS * STEPS - (STEPS + 4)
    assert outcome(run) == whole["outcome"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_stops_it_with_a_checkpoint_and_resume_goes_on_without_flags(
    signum: int, whole: Any, processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    import os
    import time

    run = tmp_path / "run"
    process = processes.start(tiny_train(run, "--checkpoint-interval", 0), pauses={STEP: 0.1})
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signum)
    assert process.wait() == 128 + signum, process.stderr
    assert "Traceback" not in process.stderr
    assert f"pdarts-fast train --resume --run-dir {run} goes on" in process.stderr
    resumed = processes.run(["train", "--resume", "--run-dir", str(run)])
    assert resumed.status == 0, resumed.stderr
    assert outcome(run) == whole["outcome"]


def test_a_finished_run_resumes_to_itself(
    whole: Any, processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    before = outcome(whole["run"])
    again = processes.run(["train", "--resume", "--run-dir", str(whole["run"])], counts=[STEP])
    assert again.status == 0, again.stderr
    assert STEP not in again.counts
    assert outcome(whole["run"]) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "4"], "was made with other settings: --epochs (2, now 4)"),
        (["--genotype", "DARTS_V2"], "is of another cell: leave --genotype out"),
    ],
    ids=["another setting", "another cell"],
)
def test_resume_with_something_else_is_refused(
    flags: list[str], message: str, whole: Any, processes: Any, tiny_train: Command
) -> None:
    process = processes.run(tiny_train(whole["run"], "--resume", *flags))
    assert process.status == 1
    assert message in process.stderr
    assert outcome(whole["run"]) == whole["outcome"]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--lr", 100, "--grad-clip", 1e9, "--epochs", 99, "--weight-decay", 0.9)
    process = processes.run(tiny_train(run, *flags))
    assert process.status == 1, process.stderr
    assert "is not finite; the last good checkpoint is in" in process.stderr
    state = CheckpointFolder(run / "checkpoints").load()
    assert state is not None
    values = state["training"]["network"].values()
    assert all(torch.isfinite(value).all() for value in values)


def test_the_last_epoch_is_evaluated_whatever_the_interval(
    processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert processes.run(tiny_train(run, "--validation-interval", 2, "--epochs", 3)).status == 0
    epochs = [line["epoch"] for line in records(run) if line["kind"] == "validation"]
    assert epochs == [1, 2]


def test_a_run_directory_is_replaced_by_overwrite_only(
    processes: Any, tiny_train: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    RunDirectory(run).close()
    (run / "mine.txt").write_text("keep me")
    assert processes.run(tiny_train(run, "--epochs", 1)).status == 2
    replaced = processes.run(tiny_train(run, "--epochs", 1, "--overwrite"))
    assert replaced.status == 0, replaced.stderr
    assert (run / "mine.txt").read_text() == "keep me"
    assert not (run / "alphas.jsonl").exists()
