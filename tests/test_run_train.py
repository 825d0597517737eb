"""The commands train, evaluate and export end to end, on small folders of images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdarts_fast import cli
from pdarts_fast.config import SearchConfig
from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.run_train import then_train
from pdarts_fast.trained import load_trained

pytestmark = pytest.mark.usefixtures("one_thread")
RESIDENT = (
    "--genotype PDARTS --dataset image-folder --image-size 16 --cells 3 --channels 2 "
    "--no-auxiliary --cutout 0 --batch-size 8 --epochs 1 --device cpu --threads 1"
)
IMAGENET = (
    "--preset imagenet-256 --genotype PDARTS --cells 3 --channels 2 --batch-size 6 --epochs 2 "
    "--device cpu --threads 1 --workers 1 --checkpoint-interval 1 --log-interval 1"
)
STEP = "pdarts_fast.train_step:TrainStep.run"
TIMING = ("seconds", "overhead_seconds", "images_per_second", "peak_memory_mib")

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def trained(jpeg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished resident run on the JPEGs."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--data", str(jpeg_folder), "--run-dir", str(run)]
    assert cli.main(["train", *RESIDENT.split(), *flags]) == 0
    return run


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def test_a_run_has_all_its_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {
        "config.json", "metrics.jsonl", "genotype.json", "report.html", "checkpoints",
        "weights-best.safetensors", "weights-last.safetensors",
        "cell-normal.svg", "cell-normal.png", "cell-reduce.svg", "cell-reduce.png",
    }  # fmt: skip
    assert load_trained(trained).spec.genotype == PDARTS


def test_the_imagenet_path_trains_is_killed_and_resumes(
    jpeg_folder: Path, processes: Any, tmp_path: Path, main: Main
) -> None:
    def command(run: Path, *flags: Any) -> list[str]:
        own = ["--data", str(jpeg_folder), "--run-dir", str(run), *map(str, flags)]
        return ["train", *IMAGENET.split(), *own]

    whole = processes.run(command(tmp_path / "whole"), counts=[STEP])
    assert whole.status == 0, whole.stderr
    assert whole.counts[STEP] == 6
    killed = processes.run(command(tmp_path / "run"), kill=(STEP, 5, "before"))
    assert killed.status < 0
    # Another number of workers must not matter.
    resumed = processes.run(command(tmp_path / "run", "--resume", "--workers", 0))
    assert resumed.status == 0, resumed.stderr
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    for name in ("weights-last.safetensors", "weights-best.safetensors"):
        one, other = (tmp_path / run / name for run in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
    spec = load_trained(tmp_path / "run").spec
    assert (spec.network, spec.auxiliary, spec.num_classes) == ("imagenet", True, 3)
    status, out, err = main(
        "evaluate", tmp_path / "run", "--weights", "last", "--no-speed", "--workers", 0
    )
    assert status == 0, err
    last = [record for record in records(tmp_path / "run") if record["kind"] == "validation"][-1]
    assert f"top-1 {100 * last['accuracy']:.2f}%" in out
    assert "of 9 images of imagenet" in out


def test_search_then_train_chains_the_two(processes: Any, tiny: Any, tmp_path: Path) -> None:
    flags = ["--preset", "demo", "--max-skips", "8", "--then-train"]
    search = ["pdarts_fast.train_step:TrainStep.run"]
    run = tmp_path / "run"
    process = processes.run(tiny(run, *flags), counts=search)
    assert process.status == 0, process.stderr
    config = json.loads((run / "train" / "config.json").read_text())["config"]
    assert config["genotype"] == str(run)
    assert (config["preset"], config["dataset"], config["image_size"]) == (
        "demo", "image-folder", 8,
    )  # fmt: skip
    assert (run / "train" / "genotype.json").is_file()
    assert process.counts[search[0]] == config["epochs"]


def test_the_chained_training_has_the_searchs_data_and_resumes_with_it(tmp_path: Path) -> None:
    config = SearchConfig(
        preset="cifar100", dataset="cifar100", data=Path("d"), seed=3, amp=True, resume=True,
        image_size=64, workers=5,
    )  # fmt: skip
    train = then_train(config, tmp_path)
    assert (train.data, train.seed, train.amp, train.workers) == (Path("d"), 3, True, 5)
    assert (train.image_size, train.auxiliary, train.epochs) == (64, False, 600)
    assert not train.resume
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "config.json").write_text("{}")
    assert then_train(config, tmp_path).resume


def test_resume_needs_no_other_flag_even_if_the_genotype_file_is_gone(
    trained: Path, main: Main
) -> None:
    config = json.loads((trained / "config.json").read_text())
    before = records(trained)
    config["config"]["genotype"] = "/nowhere/genotype.json"
    (trained / "config.json").write_text(json.dumps(config))
    status, out, err = main("train", "--resume", "--run-dir", trained)
    assert status == 0, err
    assert records(trained) == before
    assert "best test accuracy" in out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--genotype", "NOPE", "--preset", "demo"], 2, "NOPE"),
        (["--genotype", "PDARTS", "--dataset", "cifar10"], 2, "needs --data DIR"),
        (["--genotype", "PDARTS", "--preset", "tiny"], 2, "tiny"),
        (["--genotype", "PDARTS", "--epochs", "many"], 2, "many"),
        (["--genotype", "PDARTS", "--preset", "demo", "--device", "cuda:99"], 2, "--device cuda"),
        (["--genotype", "PDARTS", "--data", "/nowhere"], 2, "--data /nowhere"),
        (["--genotype", "PDARTS", "--preset", "imagenet", "--data", "/nowhere"], 2, "no such"),
        (["--resume"], 2, "--resume needs --run-dir"),
        (["--preset", "demo"], 2, "--genotype is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    flags: list[str], status: int, message: str, main: Main, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    got, _, err = main("train", *flags)
    lines = err.strip().splitlines()
    assert got == status
    assert len(lines) == 1
    assert lines[0].startswith("pdarts-fast: error: ")
    assert message in lines[0]
    assert not list(tmp_path.iterdir()), "nothing is written before the checks"


def test_a_broken_image_is_named(jpeg_folder: Path, tmp_path: Path, main: Main) -> None:
    data = tmp_path / "data"
    shutil.copytree(jpeg_folder, data)
    (data / "train" / "blue" / "3.jpg").write_bytes(b"broken")
    flags = ["--data", data, "--run-dir", tmp_path / "run"]
    status, _, err = main("train", *IMAGENET.split(), *flags)
    assert status == 1
    assert "blue/3.jpg: not a readable image" in err.splitlines()[-1]


def test_a_search_is_not_resumed_as_a_training(main: Main, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": "search", "config": {}}')
    flags = ["--preset", "demo", "--genotype", "PDARTS", "--resume", "--run-dir", tmp_path]
    status, _, err = main("train", *flags)
    assert status == 2
    assert "holds a search, no training" in err


def test_evaluate_a_published_checkpoint_without_data(main: Main, tmp_path: Path) -> None:
    torch.save(NetworkCIFAR(4, 10, 3, True, PDARTS).state_dict(), tmp_path / "w.pt")
    status, out, err = main(
        "evaluate", tmp_path / "w.pt", "--genotype", "PDARTS", "--speed-batch-sizes", 1, 3
    )
    assert status == 0, err
    assert "not measured: give --data DIR" in out
    assert "speed, batch 3" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speed-batch-sizes", "0"], "--speed-batch-sizes"),
        (["--image-size", "4"], "--image-size 4: wanted"),
        (["--dataset", "digits"], "tells 3 classes apart"),
        (["--genotype", "DARTS_V2"], "--genotype is another cell"),
        (["--dataset", "cifar10", "--data", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_refuses_in_one_line(
    flags: list[str], message: str, trained: Path, main: Main
) -> None:
    status, _, err = main("evaluate", trained, *flags)
    assert status in (1, 2)
    assert len(err.strip().splitlines()) == 1
    assert message in err


def test_report_of_a_run_directory(trained: Path, main: Main) -> None:
    (trained / "report.html").unlink()
    status, out, err = main("report", trained)
    assert status == 0, err
    assert out.strip() == str(trained / "report.html")
    assert "Training on image-folder" in (trained / "report.html").read_text()
