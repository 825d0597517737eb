"""What every command that makes a run needs before and around its work."""

from __future__ import annotations

import datetime
import shlex
from typing import Any

import torch
from rich.console import Console

from pdarts_fast.errors import UsageError
from pdarts_fast.run.environment import git_state, versions
from pdarts_fast.run.progress import BarDisplay, Display, LogDisplay
from pdarts_fast.settings import Settings, flag, to_json


def pick_device(name: str) -> torch.device:
    """The device of --device, with ``auto`` resolved.

    Raises:
        UsageError: The device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA GPU here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def make_display() -> Display:
    """A progress bar on a terminal, plain log lines elsewhere."""
    console = Console(stderr=True)
    return BarDisplay(console) if console.is_terminal else LogDisplay()


def description(
    config: Settings, command: str, dataset: dict[str, Any], hardware: dict[str, Any]
) -> dict[str, Any]:
    """What config.json of every run holds: the settings and what they were run with."""
    return {
        "kind": config.command,
        "config": to_json(config),
        "command": command,
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dataset": dataset,
    }


def command_line(config: Settings, preset: str, base: Settings) -> str:
    """The command line that gives `config`: its preset and the flags that differ from it.

    Args:
        preset: Value of ``--preset``.
        base: The settings of that preset.
    """
    values = to_json(base)
    words = ["pdarts-fast", config.command, "--preset", preset]
    for name, value in to_json(config).items():
        if name in ("preset", "config", "resume", "overwrite") or value == values[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            several = value if isinstance(value, list) else [value]
            words += [flag(name), *(str(one) for one in several)]
    return shlex.join(words)
