"""Checkpoints: whole or ignored, the last two kept, nothing but tensors and plain values read."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pdarts_fast.errors import RunError
from pdarts_fast.run.checkpoint import CheckpointFolder, random_state, set_random_state

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def fill(folder: CheckpointFolder, count: int) -> None:
    for number in range(1, count + 1):
        folder.save({"n": number, "weights": torch.full((3,), float(number))})


def test_nothing_to_load(folder: CheckpointFolder) -> None:
    assert folder.load() is None
    folder.folder.mkdir()
    assert folder.load() is None


def test_what_is_saved_is_loaded(folder: CheckpointFolder) -> None:
    state = {"a": torch.arange(4.0), "b": [1, 2.5, None, "x"], "c": {"d": torch.tensor(1)}}
    path = folder.save(state)
    assert path.name == "checkpoint-000000001.pt"
    loaded = folder.load()
    assert loaded is not None
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["b"] == state["b"]


def test_only_the_last_two_are_kept(folder: CheckpointFolder) -> None:
    fill(folder, 5)
    assert names(folder) == [
        "checkpoint-000000004.json",
        "checkpoint-000000004.pt",
        "checkpoint-000000005.json",
        "checkpoint-000000005.pt",
    ]


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "bit":
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes(content)
    elif how == "no-json":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text({"cut-json": '{"sha', "odd-json": "[]"}[how])


DAMAGES = ["truncated", "bit", "no-json", "cut-json", "odd-json"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    how: str, folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    fill(folder, 3)
    damage(folder.folder / "checkpoint-000000003.pt", how)
    with caplog.at_level(logging.WARNING):
        loaded = folder.load()
    assert loaded is not None
    assert loaded["n"] == 2
    assert len(caplog.messages) == 1
    assert "checkpoint-000000003.pt" in caplog.messages[0]
    assert caplog.messages[0].endswith("it is ignored")


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_ones_do_not_count_among_the_two_that_are_kept(
    how: str, folder: CheckpointFolder
) -> None:
    fill(folder, 3)
    damage(folder.folder / "checkpoint-000000003.pt", how)
    again = CheckpointFolder(folder.folder)
    assert again.load() is not None
    again.save({"n": 4})
    assert names(folder) == [
        "checkpoint-000000002.json",
        "checkpoint-000000002.pt",
        "checkpoint-000000004.json",
        "checkpoint-000000004.pt",
    ]


def test_all_damaged_is_none(folder: CheckpointFolder) -> None:
    fill(folder, 2)
    for number in (1, 2):
        damage(folder.folder / f"checkpoint-00000000{number}.pt", "bit")
    assert folder.load() is None


def test_rests_of_a_killed_write_are_removed(folder: CheckpointFolder) -> None:
    fill(folder, 1)
    (folder.folder / ".checkpoint-000000002.pt.tmp").write_bytes(b"half")
    (folder.folder / "notes").write_text("mine")
    assert folder.load() is not None
    assert names(folder) == ["checkpoint-000000001.json", "checkpoint-000000001.pt", "notes"]


def test_a_disk_that_refuses_keeps_the_checkpoints_before(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, 2)

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        folder.save({"n": 3})
    monkeypatch.undo()
    loaded = folder.load()
    assert loaded is not None
    assert loaded["n"] == 2


def test_another_format_is_refused_not_skipped(folder: CheckpointFolder) -> None:
    fill(folder, 1)
    folder.save({"format": 99})
    with pytest.raises(RunError, match="has format 99, this version reads 1"):
        folder.load()


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_code_in_a_checkpoint_is_not_run(
    folder: CheckpointFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.save({"x": Evil()})
    with pytest.raises(pickle.UnpicklingError):
        folder.load()
    assert "executed" not in capsys.readouterr().out


def test_random_generators_go_on_where_they_were(folder: CheckpointFolder) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    np.random.randn()  # leaves a second normal number cached
    folder.save({"random": random_state(CPU)})
    want = (torch.randn(5), np.random.randn(5))
    torch.manual_seed(99)
    np.random.seed(99)
    loaded = folder.load()
    assert loaded is not None
    set_random_state(loaded["random"], CPU)
    assert torch.equal(torch.randn(5), want[0])
    np.testing.assert_array_equal(np.random.randn(5), want[1])


def test_the_hash_file_names_the_length_too(folder: CheckpointFolder) -> None:
    path = folder.save({"n": 1})
    note = json.loads(path.with_suffix(".json").read_text())
    assert note["bytes"] == path.stat().st_size
    assert len(note["sha256"]) == 64
