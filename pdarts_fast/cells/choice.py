"""Which cells of a derived network run as one operator, and on which backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdarts_fast.kernels import backends

# Device types where fused cells were measured against their modules.
_MEASURED = ("cpu",)

# Elements of a node, N * H * W * C, from which a fused cell was faster than its modules, in
# training and in evaluation. One thread with AVX-512, float32, PDARTS cells: training 1.5 times at
# 49,152 and 0.94 times at 36,864; evaluation even at 49,152, 1.24 times at 196,608. Below, what
# Python does between the kernels outweighs them. ``benchmarks/test_derived.py`` measures both.
_LEAST_ELEMENTS = {True: 40_000, False: 180_000}


@torch.compiler.assume_constant_result
def resolve(name: str, device_type: str, channels: int) -> str:
    """The backend of the cells on a device; logs it once.

    Args:
        name: ``auto`` or a name of ``backends.NAMES``.
        device_type: Of the network's parameters.
        channels: Of its widest cell.

    Raises:
        UsageError: It does not exist, is not usable, or does not serve this device or width.
    """
    if name == backends.REFERENCE or (name == backends.AUTO and device_type not in _MEASURED):
        return backends.REFERENCE
    chosen = backends.resolve(name, device_type, channels)
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
    return cell.by_name or is_faster(cell, s1)


def is_faster(cell: Any, s1: Tensor) -> bool:
    """Whether kernels beat modules for a cell's input, by what was measured.

    A fixed rule and no measurement on the spot: runs must repeat bit for bit.

    Args:
        cell: A ``network.Cell``.
        s1: Its second input.
    """
    from pdarts_fast.kernels.rows import storage_dtype

    divisor = 2 if cell.reduction else 1
    height, width = (-(-side // divisor) for side in s1.shape[2:])
    elements = s1.shape[0] * height * width * cell.C
    # Under autocast torch's own bfloat16 kernels are the rival: not measured.
    plain = storage_dtype(s1) == torch.float32
    return plain and elements >= _LEAST_ELEMENTS[cell.training]
