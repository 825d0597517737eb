"""What the passes of a cell share beside the arrays of the primitives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pdarts_fast.cells.plan import CellPlan, Place


@dataclass
class ExtraRun:
    """Custom operations of one node, evaluated with a graph of their own.

    Attributes:
        total: Their weighted sum, ``[N, C, H, W]``.
        states: The leaf that stands for each source state.
        weights: The leaf that stands for the weights, ``[edges, ops]``.
    """

    total: Tensor
    states: dict[int, Tensor]
    weights: Tensor


@dataclass
class Context:
    """One call of a cell.

    Attributes:
        plan: The cell.
        device: Of everything.
        training: Batch statistics and dropout, or running statistics and none.
        modules: Module of every custom operation, by place.
        rates: Rate of every active skip dropout, by place.
        drop_path: Drop-path probability; 0 for none.
        image_dtype: dtype of the images that custom operations see.
        autocast: dtype of the caller's autocast region, None outside of one.
        record: Whether a backward pass may follow.
        masks: Factors 0 or ``1 / (1 - p)``: ``[N, H, W, C]`` of a skip dropout, ``[N, 1, 1, 1]``
            of a drop-path, by place.
        extras: Custom operations by node.
        drawn: Whether ``masks`` already holds those of the drop-path.
    """

    plan: CellPlan
    device: torch.device
    training: bool
    modules: Mapping[Place, nn.Module]
    rates: Mapping[Place, float]
    drop_path: float
    image_dtype: torch.dtype
    autocast: torch.dtype | None
    record: bool
    masks: dict[Place, Tensor] = field(default_factory=dict)
    extras: dict[int, ExtraRun] = field(default_factory=dict)
    drawn: bool = False

    @contextmanager
    def caller_modes(self) -> Iterator[None]:
        """Gradient recording and autocast as outside of the cell's passes."""
        with (
            torch.set_grad_enabled(self.record),
            torch.autocast(
                self.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ),
        ):
            yield


@dataclass
class Stored:
    """What the backward pass reads; C is padded to the backend's channels.

    Attributes:
        inputs: Both cell inputs, ``[N, H, W, Cx]``.
        states: Both after preprocessing, ``[N, H, W, C]``.
        raw: The same before BatchNorm where that has scale and shift; else empty.
        nodes: ``[N, H, W, steps * C]``, node after node.
        slots: Outputs before BatchNorm, ``[slots, N, H, W, C]``.
        norms: Scale and shift of plain BatchNorm, float64 ``[rows + 1, 2, C]``. Rows are slots
            and both inputs in training, ``plan.norms`` in evaluation; the last is 1 and 0.
        gains: gamma and beta of ``plan.norms``, float64 ``[norms + 1, 2, C]``, the last 1 and 0;
            None if no BatchNorm has them.
    """

    inputs: list[Tensor]
    states: list[Tensor]
    raw: list[Tensor]
    nodes: Tensor
    slots: Tensor
    norms: Tensor
    gains: Tensor | None
