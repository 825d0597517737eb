"""Choosing a backend: what is usable, what `auto` picks, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.backends import Availability


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which backends beside `reference` exist, by name; the log begins empty."""

    def plug(**found: Availability) -> None:
        modules = {
            name: SimpleNamespace(availability=lambda value=value: value)
            for name, value in found.items()
        }
        monkeypatch.setattr(backends, "load", modules.get)
        monkeypatch.setattr(backends, "_logged", set())

    return plug


def test_reference_is_always_usable_and_every_name_has_a_reason() -> None:
    found = backends.available()
    assert list(found) == list(backends.NAMES) == ["reference", "cpu", "triton"]
    assert found["reference"].usable
    assert all(value.reason for value in found.values())


def test_a_backend_without_a_loader_is_not_built(plugged: Any) -> None:
    plugged()
    assert backends.available()["cpu"] == Availability(False, "not built into this version")
    assert backends.available()["triton"] == Availability(False, "not built into this version")


def test_no_loader_means_none() -> None:
    assert backends.load("no_such_backend") is None


@pytest.mark.parametrize(
    ("found", "device", "want"),
    [
        ({}, "cpu", "reference"),
        ({}, "cuda:1", "reference"),
        ({}, "meta", "reference"),
        ({"cpu": Availability(True, "AVX2")}, "cpu", "cpu"),
        ({"cpu": Availability(True, "AVX2")}, "cuda", "reference"),
        ({"cpu": Availability(False, "no compiler")}, "cpu", "reference"),
        ({"triton": Availability(True, "sm_90")}, "cuda", "triton"),
        ({"triton": Availability(True, "sm_90")}, "cpu", "reference"),
    ],
    ids=[
        "nothing_on_cpu",
        "nothing_on_cuda",
        "nothing_on_meta",
        "cpu_on_cpu",
        "cpu_not_on_cuda",
        "unusable_cpu",
        "triton_on_cuda",
        "triton_not_on_cpu",
    ],
)
def test_auto_picks_the_best_usable(
    plugged: Any, found: dict[str, Availability], device: str, want: str
) -> None:
    plugged(**found)
    assert backends.resolve("auto", device) == want


def test_auto_says_once_what_runs_and_why(plugged: Any, caplog: pytest.LogCaptureFixture) -> None:
    plugged(cpu=Availability(False, "no compiler found"))
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        backends.resolve("auto", "cpu")
        backends.resolve("auto", "cpu")
    assert len(caplog.messages) == 1
    assert "backend reference runs" in caplog.messages[0]
    assert "cpu is unusable: no compiler found" in caplog.messages[0]


def test_a_usable_backend_runs_by_name(plugged: Any) -> None:
    plugged(cpu=Availability(True, "AVX2"))
    assert backends.resolve("cpu", "cpu") == "cpu"
    assert backends.resolve("reference", "cpu") == "reference"


@pytest.mark.parametrize(
    ("found", "name", "message"),
    [
        ({}, "triton", "--backend triton: not built into this version"),
        ({"cpu": Availability(False, "no compiler found")}, "cpu", "--backend cpu: no compiler"),
        ({"triton": Availability(True, "sm_90")}, "triton", "runs on device cuda, .* is on cpu"),
        ({}, "fast", "--backend fast: no such backend; choose one of auto, reference, cpu"),
    ],
    ids=["not_built", "unusable", "wrong_device", "unknown"],
)
def test_what_cannot_run_is_refused_by_name(
    plugged: Any, found: dict[str, Availability], name: str, message: str
) -> None:
    plugged(**found)
    with pytest.raises(UsageError, match=message) as error:
        backends.resolve(name, "cpu")
    assert "--backend" in str(error.value)
    assert "\n" not in str(error.value)


def test_cells_too_wide_for_a_backend_run_on_the_next(
    plugged: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugged(triton=Availability(True, "sm_90"))
    assert backends.resolve("auto", "cuda", 64) == "triton"
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        assert backends.resolve("auto", "cuda", 144) == "reference"
    assert "triton is left out: its kernels take cells of at most 64 channels" in caplog.text
    with pytest.raises(UsageError, match=r"--backend triton: .* at most 64 channels, not 144"):
        backends.resolve("triton", "cuda", 144)


def test_the_registry_imports_no_torch() -> None:
    program = (
        "import sys; import pdarts_fast.kernels.backends as b; b.resolve('reference', 'cpu');"
        "sys.exit('torch' in sys.modules)"
    )
    root = backends.__file__.rsplit("kernels", 1)[0]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
