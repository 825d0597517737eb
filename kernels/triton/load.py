"""How ``kernels.backends`` sees the Triton kernels."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

from ..backends import Availability

if TYPE_CHECKING:
    from torch import Tensor, nn

# bfloat16 products and TF32 begin with Ampere.
OLDEST = (8, 0)


def availability() -> Availability:
    """Whether the kernels run on this machine's GPUs, and one line of reason."""
    if importlib.util.find_spec("triton") is None:
        return Availability(False, "the package triton is not installed")
    import torch

    if torch.version.hip is not None:
        return Availability(False, "these kernels are checked for CUDA only, this torch is ROCm's")
    if not torch.cuda.is_available():
        return Availability(False, "torch finds no CUDA GPU")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(index)
        if found < OLDEST:
            name = torch.cuda.get_device_name(index)
            return Availability(
                False, f"needs GPUs of sm_80 or newer, {name} is sm_{found[0]}{found[1]}"
            )
    major, minor = torch.cuda.get_device_capability(0)
    return Availability(True, f"Triton kernels for {torch.cuda.get_device_name(0)}, "
                              f"sm_{major}{minor}")  # fmt: skip


@lru_cache(maxsize=1)
def register() -> None:
    """Makes the primitives known to ``kernels.cell`` under the name ``triton``."""
    from .. import cell_operator
    from .primitives import TritonPrimitives
    from .whole_cell import TritonCell

    cell_operator.register_backend("triton", TritonPrimitives(), TritonCell())


def prepare_cell(cell: nn.Module) -> None:
    """Checks the kernels once per device and version, and looks up the cell's modules.

    Raises:
        RunError: A kernel is wrong on this device.
    """
    from .. import cell as cells
    from .self_check import require

    register()
    require(next(cell.parameters()).device)
    cells.prepare(cell)


def run_cell(cell: nn.Module, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
    """What ``Cell.forward`` returns; see ``kernels.cell.run``."""
    from .. import cell as cells

    return cells.run("triton", cell, s0, s1, weights)
