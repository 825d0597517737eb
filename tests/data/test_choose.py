"""What `--loader` stands for, and that the log says why."""

from __future__ import annotations

import logging

import pytest
import torch

from pdarts_fast.data import Augmentation, ImageData, dali_pipeline
from pdarts_fast.data.choose import array_loader, choose_loader
from pdarts_fast.data.loader import ResidentLoader
from pdarts_fast.data.prefetch import Prefetcher
from pdarts_fast.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LACK = "DALI is not installed (pip install nvidia-dali-cuda130)"


@pytest.mark.parametrize(
    ("name", "device", "files", "lack", "chosen", "reason"),
    [
        ("auto", CUDA, False, None, "dali", "auto: augments on the GPU"),
        ("auto", CUDA, True, None, "dali", "auto: augments on the GPU"),
        ("auto", CPU, False, None, "resident", "auto: the fastest on a CPU"),
        ("auto", CPU, True, None, "dali", "auto: the fastest on a CPU"),
        ("auto", CUDA, False, LACK, "resident", f"auto: {LACK}"),
        ("auto", CUDA, True, LACK, "torchvision", f"auto: {LACK}"),
        ("auto", CPU, False, LACK, "resident", "auto: the fastest on a CPU"),
        ("auto", CPU, True, LACK, "torchvision", f"auto: {LACK}"),
        ("resident", CUDA, False, None, "resident", "--loader resident"),
        ("torchvision", CPU, True, LACK, "torchvision", "--loader torchvision"),
        ("dali", CPU, False, None, "dali", "--loader dali"),
    ],
)
def test_the_choice_and_its_reason(
    name: str, device: torch.device, files: bool, lack: str | None, chosen: str, reason: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(dali_pipeline, "missing", lambda: lack)
    with caplog.at_level(logging.INFO):
        assert choose_loader(name, device, files=files) == chosen
    assert [record.getMessage() for record in caplog.records] == [f"loader: {chosen} ({reason})"]


def test_dali_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_pipeline, "missing", lambda: LACK)
    with pytest.raises(UsageError, match=r"--loader dali: DALI is not installed .* --loader auto"):
        choose_loader("dali", CPU, files=False)


def test_only_a_gpu_gets_a_thread_that_runs_ahead() -> None:
    data = ImageData("zeros", torch.zeros((4, 3, 2, 2), dtype=torch.uint8),
                     torch.zeros(4, dtype=torch.int64), ("a",))  # fmt: skip
    options = {"batch_size": 2, "augmentation": Augmentation(0), "mean": (0, 0, 0),
               "std": (1, 1, 1), "seed": 0, "stream": "s", "shuffle": True}  # fmt: skip
    assert isinstance(array_loader("resident", data, device=CPU, **options), ResidentLoader)
    if torch.cuda.is_available():
        assert isinstance(array_loader("resident", data, device=CUDA, **options), Prefetcher)
