"""Bad input and failures of a search: one clear line each, and nothing is lost."""

from __future__ import annotations

import json
import pickle
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdarts_fast import cli
from pdarts_fast.run.checkpoint import CheckpointFolder

STEP = "pdarts_fast.step:SearchStep._step"
REPLACE = "os:replace"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_cifar(folder: Path, *, labels: int = 10, cut: int = 0) -> None:
    """Writes CIFAR-10 files of 20 images, the first one cut short."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [int(label) for label in rng.integers(0, labels, 20)],
        }
        content = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(content[: len(content) - (cut if name[-1] == "1" else 0)])
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))


def broken_image(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            (folder / name / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")


def empty_class(folder: Path) -> None:
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()


@pytest.mark.parametrize(
    ("dataset", "make", "status", "message"),
    [
        ("image-folder", lambda f: None, 2, "no such folder"),
        ("cifar10", lambda f: None, 2, "no such folder"),
        (
            "cifar10",
            lambda f: write_cifar(f, cut=200),
            1,
            "data_batch_1: not a readable CIFAR file",
        ),
        ("cifar10", lambda f: write_cifar(f, labels=200), 1, "is out of range"),
        ("image-folder", broken_image, 1, "not a readable image"),
        ("image-folder", empty_class, 1, "no image in this class folder"),
    ],
    ids=[
        "no-folder",
        "no-cifar-folder",
        "truncated",
        "class-counts",
        "broken-image",
        "empty-class",
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(
    dataset: str, make: Any, status: int, message: str, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    make(data)
    before = snapshot(tmp_path)
    flags = ["--dataset", dataset, "--data", data, "--no-checksum"]
    line = processes.run(tiny(run, *flags)).error_line(status)
    assert message in line
    assert snapshot(tmp_path) == before
    assert not run.exists()


def test_too_few_images_are_refused_before_an_old_run_is_removed(
    processes: Any, tiny: Any, images: Path, tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("circle", "cross"):
        (data / name).mkdir(parents=True)
        for index in range(2):
            source = images / name / f"{index}.png"
            (data / name / source.name).write_bytes(source.read_bytes())
    run.mkdir()
    (run / "config.json").write_text("{}")
    flags = ["--data", data, "--overwrite", "--data-split", 0.4]
    line = processes.run(tiny(run, *flags)).error_line(2)
    assert "leaves one part empty" in line
    assert (run / "config.json").read_text() == "{}"


@pytest.fixture(scope="module")
def finished(processes: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests may read it only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert processes.run(tiny(run)).status == 0
    return run


def test_an_existing_run_is_refused_and_left_as_it_is(
    finished: Path, processes: Any, tiny: Any
) -> None:
    before = snapshot(finished)
    line = processes.run(tiny(finished)).error_line(2)
    assert f"--run-dir {finished} exists and is not empty" in line
    assert "--resume" in line
    assert "--overwrite" in line
    assert snapshot(finished) == before


def test_overwrite_removes_only_what_a_run_writes(
    processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert processes.run(tiny(run)).status == 0
    (run / "notes.txt").write_text("mine")
    (run / "report.html").write_text("old")
    (run / "kept").mkdir()
    (run / "kept" / "config.json").write_text("mine")
    assert processes.run(tiny(run, "--overwrite", "--seed", 4)).status == 0
    assert processes.run(tiny(other, "--seed", 4)).status == 0
    assert outcome(run) == outcome(other)
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "kept" / "config.json").read_text() == "mine"
    assert not (run / "report.html").exists()


def test_a_run_folder_below_a_file_cannot_be_made(
    processes: Any, tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = processes.run(tiny(tmp_path / "file" / "run")).error_line(1)
    assert "Not a directory; choose a folder that can be written to" in line
    line = processes.run(tiny(tmp_path / "file")).error_line(2)
    assert "is a file: give a folder" in line
    line = processes.run(["search", "--resume", "--run-dir", str(tmp_path / "file")]).error_line(2)
    assert "is a file: give a folder" in line or "needs --data" in line


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("EROFS", "Read-only file system; choose a folder that can be written to"),
        ("EACCES", "Permission denied; choose a folder that can be written to"),
        ("ENOSPC", "No space left on device; free some space"),
        ("EIO", "Input/output error; check the disk"),
    ],
)
def test_a_disk_that_refuses_the_first_file(
    kind: str, advice: str, processes: Any, tiny: Any, tmp_path: Path
) -> None:
    process = processes.run(tiny(tmp_path / "run"), fault=("pathlib:Path.mkdir", 1, kind))
    assert advice in process.error_line(1)
    process = processes.run(tiny(tmp_path / "run"), fault=(REPLACE, 1, kind))
    assert advice in process.error_line(1)


@pytest.mark.parametrize(
    "place", ["os:fsync", REPLACE, "torch:save"], ids=["write", "rename", "save"]
)
@pytest.mark.parametrize("call", [9, 12, 14], ids=lambda n: f"call{n}")
def test_no_space_during_a_checkpoint_keeps_the_last_good_one(
    place: str,
    call: int,
    finished: Path,
    processes: Any,
    tiny: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    process = processes.run(tiny(run, "--checkpoint-interval", 1), fault=(place, call, "ENOSPC"))
    assert "No space left on device" in process.error_line(1)
    assert CheckpointFolder(run / "checkpoints").load() is not None
    assert processes.run(tiny(run, "--resume")).status == 0
    assert outcome(run) == outcome(finished)


def test_a_full_disk_under_the_metrics(
    finished: Path, processes: Any, tiny: Any, outcome: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = ("pdarts_fast.run.files:_finite", 40, "ENOSPC")
    assert "metrics.jsonl" in processes.run(tiny(run), fault=fault).error_line(1)
    assert processes.run(tiny(run, "--resume")).status == 0
    assert outcome(run) == outcome(finished)


@pytest.mark.parametrize("call", [5, 9, 14], ids=lambda n: f"step{n}")
@pytest.mark.parametrize("interval", [1, 0], ids=lambda n: f"interval{n}")
def test_nan_stops_the_search_and_keeps_the_last_good_checkpoint(
    call: int,
    interval: int,
    finished: Path,
    processes: Any,
    tiny: Any,
    outcome: Any,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    flags = ["--checkpoint-interval", interval, "--log-interval", 100]
    process = processes.run(
        tiny(run, *flags), fault=(STEP.replace("_step", "forward"), call, "nan")
    )
    line = process.error_line(1)
    stage, step = {5: (1, 3), 9: (1, 5), 14: (2, 8)}[call]
    # Two forward passes a step once alphas train, three in a validation.
    assert re.search(r"the loss or gradient of step \d+ \(stage [12]\) is not finite", line)
    assert f"(stage {stage})" in line
    assert str(run / "checkpoints") in line
    state = CheckpointFolder(run / "checkpoints").load()
    assert state is not None
    network = (state["stage_state"] or {"network": {}})["network"]
    assert all(bool(value.isfinite().all()) for value in network.values())
    assert state["position"]["global_step"] <= step + 1
    resumed = processes.run(["search", "--resume", "--run-dir", str(run), "--log-interval", "2"])
    assert resumed.status == 0
    assert outcome(run)["alphas.json"] == outcome(finished)["alphas.json"]


def test_a_huge_learning_rate_ends_in_one_line(processes: Any, tiny: Any, tmp_path: Path) -> None:
    flags = ["--lr", 100, "--grad-clip", 1e9, "--weight-decay", 1, "--epochs", 40]
    process = processes.run(tiny(tmp_path / "run", *flags))
    assert "is not finite" in process.error_line(1)


def test_a_bug_in_a_search_keeps_its_traceback(processes: Any, tiny: Any, tmp_path: Path) -> None:
    process = processes.run(tiny(tmp_path / "run"), fault=(STEP, 2, "bug"))
    assert process.status == 1
    assert "RuntimeError: a bug" in process.stderr
    assert "Traceback" in process.stderr


@pytest.mark.usefixtures("one_thread")
def test_skips_that_cannot_be_reached_lose_nothing(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "search_process")
    from toy_network import ToyNetwork

    class OnlySkips(ToyNetwork):
        """On every edge `none` and the skip are far ahead: with two live ops only they are left."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for kind, alphas in zip(self.switches, self.arch_parameters(), strict=True):
                for edge, row in enumerate(self.switches[kind]):
                    alive = np.flatnonzero(row).tolist()
                    for op in (0, 3):
                        alphas.data[edge, alive.index(op)] += 5

    monkeypatch.setattr("pdarts_fast.search.Network", OnlySkips)
    run = tmp_path / "run"
    flags = ["--ops-kept", 8, 5, 2, "--max-skips", 0, "--alpha-lr", 1e-6]
    assert cli.main(tiny(run, *flags)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pdarts-fast: error: --max-skips 0 cannot be reached")
    assert f"`pdarts-fast derive {run}` lists" in line
    assert len(json.loads((run / "alphas.json").read_text())["stages"]) == 3
    assert cli.main(["derive", str(run)]) == 0
    derived = capsys.readouterr().out
    assert "at most 8 skips: Genotype(" in derived
    assert "at most 0 skips" not in derived
    assert cli.main(["derive", str(run), "--max-skips", "0"]) == 2
    assert "--max-skips 0 cannot be reached; these can: 8" in capsys.readouterr().err


def test_two_processes_do_not_write_one_run(processes: Any, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = processes.start(tiny(run), pauses={STEP: 0.2})
    deadline = time.monotonic() + 30
    while not (run / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for flag in ("--resume", "--overwrite"):
        line = processes.run(tiny(run, flag)).error_line(1)
        assert f"another process is writing into {run}" in line
    processes.run(tiny(run)).error_line(2)
    assert first.wait() == 0
