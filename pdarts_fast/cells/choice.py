"""Which cells of a derived network run as one operator, and on which backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdarts_fast.kernels import backends

# Device types where fused cells were measured against their modules.
_MEASURED = ("cpu",)


@torch.compiler.assume_constant_result
def resolve(name: str, device_type: str) -> str:
    """The backend of the cells on a device; logs it once.

    Args:
        name: ``auto`` or a name of ``backends.NAMES``.
        device_type: Of the network's parameters.

    Raises:
        UsageError: It does not exist, is not usable, or does not serve this device.
    """
    if name == backends.REFERENCE or (name == backends.AUTO and device_type not in _MEASURED):
        return backends.REFERENCE
    chosen = backends.resolve(name, device_type)
    if chosen != backends.REFERENCE:
        backends.load(chosen).register()
    return chosen


def runs_fused(cell: Any, s0: Tensor, s1: Tensor) -> bool:
    """Whether a ``network.Cell`` runs as one operator for these inputs.

    Args:
        cell: With ``backend`` and ``by_name`` set.
        s0, s1: Its inputs.
    """
    if cell.backend == backends.REFERENCE:
        return False
    from pdarts_fast.cells import derived, derived_plan

    if not derived_plan.runs(tuple(cell.operations)) or not derived.fits(cell, s0, s1):
        return False
    return cell.by_name or is_faster(s1)


def is_faster(s1: Tensor) -> bool:
    """Whether kernels beat modules for a cell's input, by what was measured."""
    return s1.dtype != torch.float64
