"""The run directory: who may write into it, what --overwrite removes, config.json."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.directory import (
    RunDirectory,
    default_run_dir,
    free_gib,
    read_config,
    require_usable,
)


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    assert {path.name for path in run.path.iterdir()} == {".lock", "metrics.jsonl", "alphas.jsonl"}
    run.close()


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    RunDirectory(tmp_path).close()


@pytest.mark.parametrize("name", ["config.json", "photo.jpg", ".hidden"])
def test_a_folder_that_holds_anything_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty: --resume goes on"):
        RunDirectory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_lock_that_an_early_end_left_is_no_content(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    require_usable(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="is a file: give a folder"):
            RunDirectory(tmp_path / "file", **flags)


def test_only_one_writer(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    first.metrics.write({"n": 1})
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match="another process is writing into"):
            RunDirectory(tmp_path / "run", **flags)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"n": 1}\n'
    first.close()
    RunDirectory(tmp_path / "run", resume=True).close()


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    written = [
        "config.json", "metrics.jsonl", "alphas.jsonl", "alphas.json", "genotype.json",
        "report.html", "cell-normal.svg", "cell-normal.png", "cell-reduce.svg", "cell-reduce.png",
        "supernet-stage1.safetensors", "supernet-stage12.safetensors", ".config.json.tmp",
        ".supernet-stage1.safetensors.tmp", "checkpoints/checkpoint-000000001.pt",
        "tensorboard/events",
    ]  # fmt: skip
    own = ["notes.txt", "sub/config.json", "supernet.safetensors", "config.json.bak"]
    for name in (*written, *own):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    run = RunDirectory(tmp_path, overwrite=True)
    run.close()
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*own, ".lock", "metrics.jsonl", "alphas.jsonl"}
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_growing_files_are_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.metrics.write({"n": 1})
    run.alphas.write({"n": 1})
    lengths = run.file_lengths()
    run.metrics.write({"n": 2})
    run.truncate(lengths)
    assert run.metrics.path.read_text() == '{"n": 1}\n'
    run.truncate({})
    assert run.metrics.path.read_text() == run.alphas.path.read_text() == ""
    run.close()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"config": 3}'], ids=lambda text: text or "empty"
)
def test_a_damaged_config_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json .*: give --overwrite to start again"):
        read_config(tmp_path)


def test_no_config_is_none(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None
    (tmp_path / "file").touch()
    assert read_config(tmp_path / "file") is None


def test_default_folder_names_data_and_seed() -> None:
    assert re.fullmatch(r"runs/digits-7-\d{8}T\d{6}", str(default_run_dir("digits", 7)))


def test_free_space_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert free_gib(tmp_path / "a" / "b") == pytest.approx(free_gib(tmp_path), rel=0.1)
