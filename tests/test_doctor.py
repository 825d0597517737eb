"""The doctor command: says what is there, and fails only if the data set cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pdarts_fast import doctor
from pdarts_fast.kernels import backends


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def rows(text: str) -> dict[str, str]:
    """The table of the doctor as label -> text."""
    labels = [
        "versions", "cpu features", "cpu", "gpu", "triton", "nvidia.dali", "compiler", "disk",
        *(f"backend {name}" for name in backends.NAMES), "data",
    ]  # fmt: skip
    found = {}
    for line in text.splitlines():
        for label in labels:
            if line.startswith(f"{label} "):
                found.setdefault(label, line.removeprefix(label).strip())
                break
    return found


@pytest.mark.usefixtures("wide")
def test_every_row_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(None, "digits", True) == 0
    found = rows(capsys.readouterr().out)
    assert "torch " in found["versions"]
    assert "python 3." in found["versions"]
    assert "cores" in found["cpu"]
    assert "GiB" in found["cpu"]
    assert found["gpu"]
    assert found["compiler"].startswith(("yes: ", "no: "))
    assert found["disk"].endswith("GiB free for runs/")
    assert found["backend reference"].startswith("yes: ")
    for name in backends.NAMES:
        assert found[f"backend {name}"].startswith(("yes: ", "no: "))
    for package in ("triton", "nvidia.dali"):
        assert found[package].startswith(("yes: ", "no: "))


@pytest.mark.usefixtures("wide")
def test_a_data_set_that_is_there(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(images, "image-folder", True) == 0
    assert "data image-folder  yes: 27 training and 6 test images" in capsys.readouterr().out


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("dataset", "message"),
    [("cifar10", "no: "), ("image-folder", "no such folder")],
    ids=["cifar10", "image-folder"],
)
def test_a_data_set_that_is_not_there_fails(
    dataset: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.examine(tmp_path / "missing", dataset, True) == 1
    assert message in capsys.readouterr().out


@pytest.mark.usefixtures("wide")
def test_a_library_that_fails_to_load_is_a_no_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = doctor.importlib.import_module

    def fail(name: str, *arguments: Any) -> Any:
        if name == "nvidia.dali":
            raise OSError("libcudart.so: cannot open shared object file")
        if name == "triton":
            raise ImportError("no module named triton")
        return load(name, *arguments)

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.examine(None, "digits", True) == 0
    found = rows(capsys.readouterr().out)
    assert found["nvidia.dali"] == "no: libcudart.so: cannot open shared object file"
    assert found["triton"] == "no: no module named triton"
    assert found["compiler"] == "no: none of c++, g++, clang++ on PATH"


def test_without_flags_the_bundled_digits_are_checked(processes: Any) -> None:
    process = processes.run(["doctor"])
    assert process.status == 0, process.stderr
    assert "data digits" in process.stdout
    assert "yes: 1438 training and 359 test images" in " ".join(process.stdout.split())


def test_unknown_data_set_is_refused(processes: Any) -> None:
    process = processes.run(["doctor", "--dataset", "mnist"])
    assert process.status == 2
    assert process.stderr.startswith("pdarts-fast: error: ")
    assert len(process.stderr.splitlines()) == 1


def test_kernels_without_a_gpu_are_not_called_good(
    capsys: pytest.CaptureFixture[str], wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert doctor.examine(None, "digits", True, kernels=True) == 0
    assert "kernels" in (out := capsys.readouterr().out)
    assert "not checked: torch finds no CUDA GPU" in out


@pytest.mark.usefixtures("wide")
def test_a_wrong_kernel_is_named_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdarts_fast.kernels.triton import self_check

    usable = {"triton": backends.Availability(True, "sm_90")}
    monkeypatch.setattr(backends, "available", lambda: usable)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)
    good = self_check.Finding("mix", "fp32", "node", 1e-7, 5e-5)
    bad = self_check.Finding("fan_out", "bf16", "y", 0.5, 3e-2)
    monkeypatch.setattr(self_check, "check", lambda device: [good, bad])
    monkeypatch.setattr(doctor, "_gpu", lambda: "one")
    assert doctor.examine(None, "digits", True, kernels=True) == 1
    out = capsys.readouterr().out
    assert "1 of 2 checks passed" in out
    assert "fan_out (bf16, y): 5.0e-01 off, 3e-02 allowed" in out
