"""The modules of a recognised cell, in the order of its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pdarts_fast.cells.plan import CellPlan, Place
from pdarts_fast.dropin.watch import parameters_of


@dataclass
class Modules:
    """What of a cell's modules the passes read and write, in the order of its plan.

    Attributes:
        convolutions: One for each of ``plan.weights``.
        norms: One for each of ``plan.norms``.
        affine: Which of the norms have a scale and a shift.
        extras: Module of every custom operation.
        dropouts: Module of every skip dropout.
    """

    convolutions: Sequence[Any]
    norms: Sequence[Any]
    affine: Sequence[bool]
    extras: Mapping[Place, nn.Module]
    dropouts: Mapping[Place, nn.Dropout]

    @classmethod
    def of(cls, cell: nn.Module, plan: CellPlan) -> Modules:
        """Looks every path of a plan up in a cell."""
        dropouts = {place: cell.get_submodule(path) for place, path in plan.dropouts}
        norms: list[Any] = [cell.get_submodule(path) for path in plan.norms]
        return cls(
            [cell.get_submodule(path.removesuffix(".weight")) for path in plan.weights],
            norms,
            [norm.weight is not None for norm in norms],
            {(e.edge, e.op): cell.get_submodule(e.path) for e in plan.extras},
            dropouts,  # type: ignore[arg-type]
        )

    def weights(self) -> list[Tensor]:
        """Those of the convolutions."""
        # Ten times as fast as attributes of modules; a replica's parameters are nothing else.
        found = [module.__dict__["_parameters"].get("weight") for module in self.convolutions]
        if any(weight is None for weight in found):
            return [module.weight for module in self.convolutions]
        return found

    def gains(self) -> list[Tensor]:
        """Scale and shift of every BatchNorm that has them."""
        affine = [norm for norm, has in zip(self.norms, self.affine, strict=True) if has]
        return [tensor for norm in affine for tensor in (norm.weight, norm.bias)]

    def statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        """Running mean and variance of every BatchNorm, and its counter."""
        buffers = [norm.__dict__["_buffers"] for norm in self.norms]
        running = [b for own in buffers for b in (own["running_mean"], own["running_var"])]
        return running, [own["num_batches_tracked"] for own in buffers]

    def parameters(self) -> list[Tensor]:
        """Those of custom operations."""
        return [
            parameter
            for extra in self.extras.values()
            for module in extra.modules()
            for parameter in parameters_of(module).values()
            if parameter is not None
        ]
