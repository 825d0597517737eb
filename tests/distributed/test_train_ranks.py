"""Trainings of two ranks: digits, resident and streamed JPEGs, exact resume, failures."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast.trained import load_trained

STEP = "pdarts_fast.train_step:TrainStep.run"
DIGITS = (
    "--preset demo --genotype PDARTS --cells 3 --channels 2 --image-size 8 --epochs 1 "
    "--batch-size 256 --device cpu"
)
RESIDENT = (
    "--genotype PDARTS --dataset image-folder --image-size 16 --cells 3 --channels 2 "
    "--no-auxiliary --cutout 0 --batch-size 8 --epochs 2 --drop-path 0.5 --device cpu"
)
IMAGENET = (
    "--preset imagenet-256 --genotype PDARTS --cells 3 --channels 2 --batch-size 6 --epochs 1 "
    "--device cpu --workers 1"
)
TIMING = ("seconds", "overhead_seconds", "images_per_second", "peak_memory_mib")

Run = Callable[..., list[Any]]


def command(recipe: str, data: Path | None, run: Path, *flags: Any) -> list[str]:
    own = ["--threads", "1", "--checkpoint-interval", "1", "--log-interval", "1"]
    where = [] if data is None else ["--data", str(data)]
    return ["train", *recipe.split(), *own, *where, "--run-dir", str(run), *map(str, flags)]


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def assert_ended_well(ranks: list[Any]) -> None:
    assert [process.status for process in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    assert "best test accuracy" in ranks[0].stdout
    assert (ranks[1].stdout, ranks[1].stderr) == ("", "")


def test_digits(run_ranks: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_ended_well(run_ranks(command(DIGITS, None, run)))
    config = json.loads((run / "config.json").read_text())
    last = records(run)[-1]
    # Each test image counts once, however many ranks there are.
    assert last["images"] == config["dataset"]["test_images"]
    assert config["hardware"]["ranks"] == 2
    assert load_trained(run).spec.num_classes == 10


@pytest.mark.parametrize("size", [1, 2], ids=["2-to-1", "2-to-2"])
def test_jpegs_resident_killed_and_resumed(
    size: int, run_ranks: Run, processes: Any, jpeg_folder: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert_ended_well(run_ranks(command(RESIDENT, jpeg_folder, whole)))
    for process in run_ranks(command(RESIDENT, jpeg_folder, run), kill=(STEP, 5, "before")):
        assert process.status == -signal.SIGKILL
    resume = command(RESIDENT, jpeg_folder, run, "--resume")
    if size == 1:
        process = processes.run(resume)
        assert process.status == 0, process.stderr
        assert [r["step"] for r in records(run)] == [r["step"] for r in records(whole)]
        return
    assert_ended_well(run_ranks(resume))
    # Bit for bit: drop-path draws the same on each rank as without the kill.
    assert records(run) == records(whole)
    for name in ("weights-last.safetensors", "weights-best.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_jpegs_streamed_as_imagenet(run_ranks: Run, jpeg_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_ended_well(run_ranks(command(IMAGENET, jpeg_folder, run)))
    found = records(run)
    assert [r["step"] for r in found if r["kind"] == "interval"] == [1, 2, 3]
    assert found[-1]["images"] == 9
    assert load_trained(run).spec.network == "imagenet"


def test_a_broken_image_on_one_rank_ends_both(
    run_ranks: Run, jpeg_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(jpeg_folder, data)
    (data / "train" / "blue" / "3.jpg").write_bytes(b"broken")
    ranks = run_ranks(command(IMAGENET, data, tmp_path / "run", "--workers", 0))
    assert [process.status for process in ranks] == [1, 1]
    # The rank that has it says so, and rank 0 does in any case.
    assert "blue/3.jpg: not a readable image" in ranks[0].error_line(1)
    assert ranks[1].stderr == "" or "rank 1: " in ranks[1].error_line(1)


def test_a_search_and_the_training_after_it_share_the_ranks(
    run_ranks: Run, tiny: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--preset", "demo", "--batch-size", 4, "--epochs", 2, "--max-skips", 8]
    assert_ended_well(run_ranks(tiny(run, *flags, "--then-train")))
    config = json.loads((run / "train" / "config.json").read_text())
    assert config["config"]["genotype"] == str(run)
    assert config["hardware"]["ranks"] == 2
