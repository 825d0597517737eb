"""A search cell of the supernet run by fused primitives: what ``Cell.forward`` calls.

``run`` reads a module's parameters and buffers and crosses into ``cell_operator`` once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import plan as plans
from .cell_operator import (
    backend_named,
    move_running,
    primitive_by_primitive,
    register_backend,
)
from .eager_cell import EagerCell
from .rows import is_traced, storage_dtype

__all__ = [
    "Names",
    "backend_named",
    "plans",
    "prepare",
    "primitive_by_primitive",
    "register_backend",
    "run",
]


class Names:
    """The modules of a cell that hold its weights and statistics, in the order of its plan."""

    def __init__(self, cell: Any) -> None:
        in_channels = tuple(
            (m.conv_1 if hasattr(m, "conv_1") else m.op[1]).in_channels
            for m in (cell.preprocess0, cell.preprocess1)
        )
        # All skip dropouts of a network share one control; a cell without a skip needs none.
        controls = (m.control for m in cell.modules() if hasattr(m, "control"))
        self.dropout = next(controls, None)
        self.key = plans.make_key(
            cell.switches,
            channels=cell.C,
            in_channels=in_channels,
            reduction=cell.reduction,
            reduction_prev=hasattr(cell.preprocess0, "conv_1"),
            steps=cell.steps,
            multiplier=cell.multiplier,
            index=cell.index,
            dropout=self.dropout is not None,
        )
        plan = plans.from_key(self.key)
        self.convolutions = [
            cell.get_submodule(name.removesuffix(".weight")) for name in plan.weights
        ]
        self.norms = [cell.get_submodule(name) for name in plan.norms]


def prepare(cell: nn.Module) -> Names:
    """Looks up a cell's modules and keeps them with it: outside of traces, once."""
    names = Names(cell)
    cell.__dict__["fused_names"] = names
    return names


def run(backend: str, cell: nn.Module, s0: Tensor, s1: Tensor, alphas: Tensor) -> Tensor:
    """What ``Cell.forward`` returns, by the primitives of a backend.

    Args:
        backend: A name given to ``register_backend``.
        cell: A ``supernet.Cell``; its parameters and buffers are read, running statistics written.
        s0: Output of the cell before the last, ``[N, C_prev_prev, H0, W0]``.
        s1: Output of the last cell, ``[N, C_prev, H, W]``.
        alphas: Weight of every live primitive of every edge, ``[edges, k]``.

    Returns:
        ``[N, multiplier * C, H_out, W_out]``, channels-last in memory.
    """
    names = getattr(cell, "fused_names", None)
    # A replica of nn.DataParallel shares the attributes of the original, not its parameters.
    if names is None or getattr(cell, "_is_replica", False):
        names = prepare(cell)
    # Hundreds of look-ups, for which nn.Module takes ten times as long as its dictionaries.
    buffers = [norm._buffers for norm in names.norms]
    running: list[Any] = [b for own in buffers for b in (own["running_mean"], own["running_var"])]
    dtype = storage_dtype(s1)
    control: Any = names.dropout
    rate = s1.new_zeros(1, dtype=torch.float32) if control is None else control.p
    state = s1.new_zeros(2, dtype=torch.int64) if control is None else control.state
    weights: list[Any] = [module._parameters.get("weight") for module in names.convolutions]
    if any(weight is None for weight in weights):  # of a replica, or computed from others
        weights = [module.weight for module in names.convolutions]
    read = [] if cell.training else running
    settings = (rate, state, names.key, backend, cell.training, dtype)
    traced = is_traced(s1)
    if traced:
        operator = torch.ops.pdarts_fast.cell_forward
        out, *_, batch_moments, _, _ = operator(s0, s1, alphas, weights, read, *settings)
    else:
        out, batch_moments = EagerCell.apply(s0, s1, alphas, read, *settings, *weights)
    if cell.training:
        batches: list[Any] = [own["num_batches_tracked"] for own in buffers]
        counts = [out.shape[0] * out.shape[2] * out.shape[3], s1[:, 0].numel()]
        update = torch.ops.pdarts_fast.update_running if traced else move_running
        with torch.no_grad():
            update(running, batches, batch_moments, names.key, counts, backend)
    return out
