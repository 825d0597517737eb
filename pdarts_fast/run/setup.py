"""What every command that makes a run needs before and around its work."""

from __future__ import annotations

import datetime
import shlex
from typing import Any

import torch
from rich.console import Console

from pdarts_fast.data.shard import SMALLEST_PART
from pdarts_fast.errors import UsageError
from pdarts_fast.launch import Launch
from pdarts_fast.run.environment import git_state, versions
from pdarts_fast.run.progress import BarDisplay, Display, LogDisplay, NoDisplay
from pdarts_fast.settings import Settings, flag, to_json


def pick_device(name: str, launch: Launch | None = None) -> torch.device:
    """The device of --device, with ``auto`` resolved.

    Args:
        name: Value of --device.
        amp: Whether the device has to compute in bfloat16.
        launch: How the process was started: of several ranks, each has the GPU of its local rank.

    Raises:
        UsageError: The device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and launch is not None and launch.size > 1:
        if device.index is not None:
            raise UsageError(
                f"--device {name} is one GPU for {launch.size} ranks: give --device cuda, which "
                "takes one for each"
            )
        device = torch.device("cuda", launch.local_rank)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch sees no CUDA GPU here; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here")
    return device


def check_batch_size(batch_size: int, ranks: int) -> None:
    """Raise `UsageError` if a batch cannot be shared by so many ranks."""
    if batch_size % ranks or batch_size < SMALLEST_PART * ranks:
        raise UsageError(
            f"--batch-size {batch_size} is the batch of all {ranks} ranks together and has to be "
            f"{SMALLEST_PART * ranks} or more and divisible by {ranks}"
        )


def make_display(first: bool = True) -> Display:
    """A progress bar on a terminal, plain log lines elsewhere; nothing but for the first rank."""
    if not first:
        return NoDisplay()
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
