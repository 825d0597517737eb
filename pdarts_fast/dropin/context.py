"""What the passes of a recognised cell share beside the arrays of the primitives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.dropin.cell_plan import CellPlan, Place
from pdarts_fast.dropin.watch import parameters_of


@dataclass
class Modules:
    """What of a cell's modules the passes read and write, in the order of its plan.

    Attributes:
        convolutions: One for each of ``plan.weights``.
        norms: One for each of ``plan.norms``.
        extras: Module of every custom operation.
        dropouts: Module of every skip dropout.
    """

    convolutions: Sequence[Any]
    norms: Sequence[Any]
    extras: Mapping[Place, nn.Module]
    dropouts: Mapping[Place, nn.Dropout]

    @classmethod
    def of(cls, cell: nn.Module, plan: CellPlan) -> Modules:
        """Looks every path of a plan up in a cell."""
        dropouts = {place: cell.get_submodule(path) for place, path in plan.dropouts}
        return cls(
            [cell.get_submodule(path.removesuffix(".weight")) for path in plan.weights],
            [cell.get_submodule(path) for path in plan.norms],
            {(e.edge, e.op): cell.get_submodule(e.path) for e in plan.extras},
            dropouts,  # type: ignore[arg-type]
        )

    def gains(self) -> list[Tensor]:
        """Scale and shift of every BatchNorm that has them."""
        affine = [norm for norm in self.norms if norm.weight is not None]
        return [tensor for norm in affine for tensor in (norm.weight, norm.bias)]

    def parameters(self) -> list[Tensor]:
        """Those of custom operations."""
        return [
            parameter
            for extra in self.extras.values()
            for module in extra.modules()
            for parameter in parameters_of(module).values()
            if parameter is not None
        ]


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
        slots: Outputs before BatchNorm, ``[slots, N, H, W, C]``; masked copies follow in a
            forward pass.
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
