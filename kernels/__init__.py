"""Kernels of the search cell: plans, the algebra between primitives, backends, and public ops.

``weighted_sum``, ``sep_conv`` and ``dil_conv`` are of use by themselves; see ``kernels.ops``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import NormState, dil_conv, sep_conv, weighted_sum

__all__ = ["NormState", "dil_conv", "sep_conv", "weighted_sum"]


def __getattr__(name: str) -> Any:
    # Configuration imports kernels.backends, and must not import torch.
    if name in __all__:
        from . import ops

        return getattr(ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
