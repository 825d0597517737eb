"""Where backend triton runs and where it says why not; its self-check is made once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdarts_fast.errors import RunError
from pdarts_fast.kernels import plan
from pdarts_fast.kernels.triton import common, load, running, self_check


def test_arrays_beyond_32_bit_places_are_refused() -> None:
    large = torch.empty(2**17, 32, 32, 16, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements.*smaller batch"):
        common.check_storage(large)
    common.check_storage(large[: 2**17 - 1])


def test_running_statistics_that_no_table_can_hold_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = plan.make_key(
        [[True] * 8] * 14, channels=16, in_channels=(16, 16), reduction=False,
        reduction_prev=False, steps=4, multiplier=4, index=0, dropout=False,
    )  # fmt: skip
    cell = plan.from_key(key)
    buffers = [torch.zeros(16) for _ in range(2 * len(cell.norms))]
    batches = [torch.zeros((), dtype=torch.int64) for _ in cell.norms]
    stats = torch.zeros(cell.num_slots + 2, 2, 16, dtype=torch.float64)
    wide = [buffer.double() for buffer in buffers]
    assert not running.move_running(cell, wide, batches, stats, [4, 4])
    monkeypatch.setattr(running, "MAX_TABLES", 0)
    assert not running.move_running(cell, buffers, batches, stats, [4, 4])


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Lets torch report GPUs of these capabilities."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: f"card {i}")


@pytest.mark.parametrize(
    ("capabilities", "usable", "reason"),
    [
        ([], False, "torch finds no CUDA GPU"),
        ([(7, 5)], False, "needs GPUs of sm_80 or newer, card 0 is sm_75"),
        ([(9, 0), (7, 0)], False, "needs GPUs of sm_80 or newer, card 1 is sm_70"),
        ([(8, 0)], True, "Triton kernels for card 0, sm_80"),
        ([(10, 0)], True, "Triton kernels for card 0, sm_100"),
    ],
    ids=["none", "turing", "second-too-old", "ampere", "blackwell"],
)
def test_availability(
    monkeypatch: pytest.MonkeyPatch, capabilities: Any, usable: bool, reason: str
) -> None:
    pretend(monkeypatch, *capabilities)
    found = load.availability()
    assert (found.usable, found.reason) == (usable, reason)


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not load.availability().usable


@pytest.mark.parametrize("good", [True, False], ids=["right", "wrong"])
def test_kernels_are_checked_once_per_device_and_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: bool
) -> None:
    pretend(monkeypatch, (9, 0))
    properties = SimpleNamespace(name="card 0", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card 0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_checked", set())
    checks = []

    def check(device: torch.device) -> list[self_check.Finding]:
        checks.append(device)
        return [self_check.Finding("mix", "bf16", "node", 0.0 if good else 0.25, 3e-2)]

    monkeypatch.setattr(self_check, "check", check)
    device = torch.device("cuda", 0)
    for _ in range(2):
        if good:
            self_check.require(device)
            self_check._checked.clear()  # another process
        else:
            with pytest.raises(RunError, match=r"mix \(bf16\): 2.5e-01 off.*--backend reference"):
                self_check.require(device)
    assert len(checks) == (1 if good else 2)
    reports = list(tmp_path.rglob("*.failed.txt"))
    assert len(reports) == (0 if good else 1)
    assert all("card 0 sm_90" in report.read_text() for report in reports)


def test_nothing_is_checked_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "check", None)
    self_check.require(torch.device("cpu"))


def test_tf32_follows_torch() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert common.precision(torch.float32) == "tf32x3"
        torch.set_float32_matmul_precision("high")
        assert common.precision(torch.float32) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert common.precision(torch.float32) == "tf32x3"
        assert common.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2, 2, 16, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(1, 2, 2, 12), "multiples of 16, got 12"),
    ],
    ids=["dtype", "channels"],
)
def test_arrays_that_kernels_cannot_take_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common.check_storage(x)
