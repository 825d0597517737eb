"""Which backend runs a search cell, and why.

A backend other than ``reference`` plugs in as a module ``kernels/<name>/load.py`` with

    availability() -> Availability
    prepare_cell(cell) -> None                   called once before a cell runs, never in a trace
    run_cell(cell, s0, s1, weights) -> Tensor    what ``Cell.forward`` returns

``availability`` must not raise: whatever keeps the backend from running is its reason. Importing
this module does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdarts_fast.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "reference"
NAMES = (REFERENCE, "cpu", "triton")

# The only device type a backend serves; `reference` serves every one.
_DEVICE_TYPE = {"cpu": "cpu", "triton": "cuda"}
# Best first, for device types that have more than the reference.
_PREFERENCE = {"cpu": ("cpu", REFERENCE), "cuda": ("triton", REFERENCE)}

# Channels of the widest cell that a backend has kernels for, a multiple of 16.
MAX_CHANNELS = {"triton": 64}

_logged: set[str] = set()


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, and one line of reason: what it is or what it lacks."""

    usable: bool
    reason: str


def load(name: str) -> Any:
    """The module ``<name>/load.py`` of a backend, or None if this version has none."""
    package = f"{__package__}.{name}"
    if importlib.util.find_spec(package) is None:
        return None
    if importlib.util.find_spec(f"{package}.load") is None:
        return None
    return importlib.import_module(f"{package}.load")


def _availability(name: str) -> Availability:
    if name == REFERENCE:
        return Availability(True, "plain torch, one operation at a time, on every device")
    module = load(name)
    if module is None:
        return Availability(False, "not built into this version")
    return module.availability()


def available() -> dict[str, Availability]:
    """Every backend by name, with whether it is usable here and why."""
    return {name: _availability(name) for name in NAMES}


def check(name: str) -> None:
    """Refuses a backend that cannot run on any device of this machine.

    Args:
        name: ``auto`` or a backend's name.

    Raises:
        UsageError: No such backend, or it is not usable; names ``--backend`` and the reason.
    """
    if name == AUTO:
        return
    if name not in NAMES:
        wanted = ", ".join((AUTO, *NAMES))
        raise UsageError(f"--backend {name}: no such backend; choose one of {wanted}")
    found = _availability(name)
    if not found.usable:
        raise UsageError(f"--backend {name}: {found.reason}; use --backend {AUTO}")


def _log_choice(chosen: str, device_type: str, why: str) -> None:
    line = f"backend {chosen} runs the cells on {device_type}: {why}"
    if line not in _logged:
        _logged.add(line)
        logger.info(line)


def _too_wide(name: str, channels: int) -> str:
    """What keeps a backend from running cells of so many channels; empty if nothing does."""
    most = MAX_CHANNELS.get(name, channels)
    if channels <= most:
        return ""
    return f"its kernels take cells of at most {most} channels, not {channels}"


def resolve(name: str, device: torch.device | str, channels: int = 1) -> str:
    """The backend that runs on a device; logs it once.

    Args:
        name: ``auto`` for the best usable one, or a backend's name.
        device: Where the supernet's parameters lie.
        channels: C of the widest cell.

    Returns:
        One of ``NAMES``.

    Raises:
        UsageError: No such backend, it is not usable, or it does not serve this device or
            these channels.
    """
    device_type = str(device).partition(":")[0]
    check(name)
    if name != AUTO:
        served = _DEVICE_TYPE.get(name, device_type)
        if served != device_type:
            raise UsageError(
                f"--backend {name} runs on device {served}, the network is on {device_type}; "
                f"use --backend {AUTO} or move the network"
            )
        too_wide = _too_wide(name, channels)
        if too_wide:
            raise UsageError(f"--backend {name}: {too_wide}; use --backend {AUTO}")
        _log_choice(name, device_type, "asked for by name")
        return name
    passed_over: list[str] = []
    for candidate in _PREFERENCE.get(device_type, ()):
        found = _availability(candidate)
        too_wide = _too_wide(candidate, channels) if found.usable else ""
        if too_wide:
            passed_over.append(f"{candidate} is left out: {too_wide}")
        elif found.usable:
            _log_choice(candidate, device_type, "; ".join([found.reason, *passed_over]))
            return candidate
        else:
            passed_over.append(f"{candidate} is unusable: {found.reason}")
    _log_choice(REFERENCE, device_type, "; ".join(["the only backend there", *passed_over]))
    return REFERENCE
