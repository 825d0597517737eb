"""--loader from the command line: the same search by every loader, and files by DALI."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pdarts_fast import cli
from pdarts_fast.data.dali_pipeline import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TRAIN = (
    "--genotype PDARTS --image-size 16 --cells 3 --channels 2 --no-auxiliary --cutout 0 "
    "--batch-size 6 --epochs 2 --device cpu --threads 1 --workers 1 --dataset image-folder"
)
STEP = "pdarts_fast.step:SearchStep._step"


@pytest.fixture(scope="module")
def resident(
    processes: Any, tiny: Any, outcome: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the search ends in with the loader that the CPU gets."""
    run = tmp_path_factory.mktemp("resident") / "run"
    process = processes.run(tiny(run))
    assert process.status == 0, process.stderr
    assert process.stderr.count("loader: resident (auto: the fastest on a CPU)") == 1
    return outcome(run)


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_search_is_the_same_by_every_loader(
    loader: str, resident: Any, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    process = processes.run(tiny(tmp_path / "run", "--loader", loader, "--workers", 1))
    assert process.status == 0, process.stderr
    assert process.stderr.count(f"loader: {loader} (--loader {loader})") == 1
    assert outcome(tmp_path / "run") == resident


def test_a_search_killed_inside_an_epoch_goes_on_with_another_loader(
    resident: Any, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--loader", "dali", "--checkpoint-interval", 1)
    killed = processes.run(tiny(run, *flags), kill=(STEP, 8, "before"))
    assert killed.status == -signal.SIGKILL, killed.stderr
    flags = ("--loader", "torchvision", "--workers", 0, "--resume", "--checkpoint-interval", 1)
    resumed = processes.run(tiny(run, *flags))
    assert resumed.status == 0, resumed.stderr
    assert "goes on in" in resumed.stderr
    assert outcome(run) == resident


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_folder_with_a_broken_file_is_trained_on_and_evaluated(
    loader: str, jpeg_folder: Path, processes: Any, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(jpeg_folder, data)
    (data / "train" / "blue" / "3.jpg").write_bytes(b"broken")
    (data / "val" / "green" / "1.jpg").write_bytes(b"broken")
    flags = ["--data", str(data), "--run-dir", str(run), "--loader", loader]
    stopped = processes.run(["train", *TRAIN.split(), *flags])
    assert "blue/3.jpg: not a readable image" in stopped.error_line(1)
    flags += ["--skip-broken", "--overwrite"]
    process = processes.run(["train", *TRAIN.split(), *flags])
    assert process.status == 0, process.stderr
    assert f"loader: {loader}" in process.stderr
    assert "blue/3.jpg: not a readable image (no known format): skipped" in process.stderr
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["images"] for line in validations] == [8, 8]


def test_evaluate_skips_broken_files_if_told(
    jpeg_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--data", str(jpeg_folder), "--run-dir", str(run), "--loader", "dali"]
    assert cli.main(["train", *TRAIN.split(), *flags]) == 0
    data = tmp_path / "data"
    shutil.copytree(jpeg_folder, data)
    (data / "val" / "green" / "1.jpg").write_bytes(b"broken")
    command = ["evaluate", str(run), "--data", str(data), "--no-speed", "--workers", "0"]
    capsys.readouterr()
    assert cli.main(command) == 1
    assert "green/1.jpg: not a readable image" in capsys.readouterr().err
    assert cli.main([*command, "--skip-broken"]) == 0
    assert "of 8 images of image-folder" in capsys.readouterr().out
