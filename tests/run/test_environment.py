"""What a run says it was made with, and the requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from pdarts_fast.run import environment
from pdarts_fast.run.signals import Interrupted, StopRequest

CPU = torch.device("cpu")


def test_versions_name_what_is_installed() -> None:
    found = environment.versions()
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
    assert {"pdarts_fast", "python", "numpy", "safetensors"} <= set(found)
    assert all(isinstance(text, str) and text for text in found.values())


def test_hardware_of_a_cpu_run() -> None:
    found = environment.hardware(CPU, "reference")
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["gpu"] is None
    assert (found["device"], found["backend"]) == ("cpu", "reference")
    assert environment.peak_memory_mib(CPU) > 10


def test_git_state_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "pdarts_fast" / "run" / "environment.py"
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment.git_state() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    state = environment.git_state()
    assert state is not None
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    module.write_text("changed")
    state = environment.git_state()
    assert state is not None
    assert state["dirty"]


def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back_without_a_signal() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_interrupted_names_its_signal() -> None:
    assert str(Interrupted(signal.SIGTERM)) == "SIGTERM"
