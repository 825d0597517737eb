"""What the forward and the backward pass of a search cell have in common.

Saved for backward: the two inputs before and after preprocessing, the nodes, and one array a slot
(output before BatchNorm). Everything else is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import moments
from . import plan as plans
from .operation import Backend, Dropout, Operation
from .plan import Branch, Plan
from .weights import Half, Weights


@dataclass(slots=True)
class Saved:
    """What the backward pass reads; C is padded to the backend's channels.

    Attributes:
        inputs: Both cell inputs, ``[N, H, W, Cx]``.
        states: Both after preprocessing, ``[N, H, W, C]``.
        nodes: ``[N, H, W, steps * C]``, node after node.
        slots: Outputs before BatchNorm, ``[slots, N, H, W, C]``.
        stats: Mean and biased variance, float64 ``[slots + 2, 2, C]`` of the batch in training,
            ``[norms, 2, C]`` of the running statistics in evaluation.
    """

    inputs: tuple[Tensor, Tensor]
    states: tuple[Tensor, Tensor]
    nodes: Tensor
    slots: Tensor
    stats: Tensor


@dataclass(slots=True)
class Gradients:
    """Gradients of a cell; None where nobody asks.

    Attributes:
        inputs: Like ``Saved.inputs``.
        alphas: float64 ``[edges, ops]``.
        weights: Flat, in the order of ``Plan.weights``.
    """

    inputs: list[Tensor | None]
    alphas: Tensor | None
    weights: Tensor | None


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """``x`` ``[N, H, W, C]``, contiguous, with zero channels appended."""
    missing = channels - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def state_size(plan: Plan, which: int, x: Tensor) -> tuple[int, int]:
    """Height and width of an input after preprocessing."""
    divisor = 2 if plan.input_kind(which) == plans.FACTORIZED else 1
    return -(-x.shape[1] // divisor), -(-x.shape[2] // divisor)


class Pass:
    """One forward or backward pass of a cell.

    Args:
        backend: Runs the primitives.
        plan: The cell.
        weights: Its weights.
        alphas: Weights of the operations, ``[edges, ops]``.
        dropout: Rate and state of the skip dropout.
        training: Batch statistics and dropout, or running statistics and none.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        weights: Weights,
        alphas: Tensor,
        dropout: Dropout,
        training: bool,
    ) -> None:
        self.backend = backend
        self.plan = plan
        self.weights = weights
        self.alphas = alphas.detach().double()
        self.dropout = dropout
        self.training = training

    def row(self, branch: Branch, half: int = 0) -> int:
        """Row of a branch in ``Saved.stats``; ``half`` 1 is a separable's first half."""
        if not self.training:
            return branch.norms[half]
        return branch.first if half else branch.slot

    def input_row(self, which: int) -> int:
        """Row of an input's BatchNorm in ``Saved.stats``."""
        base = self.plan.num_slots if self.training else len(self.plan.norms) - 2
        return base + which

    def alpha(self, branches: Sequence[Branch]) -> Tensor:
        """Weights of branches, float64 ``[n]``."""
        edges = [branch.edge for branch in branches]
        return self.alphas[edges, [branch.op for branch in branches]]

    def state(self, saved: Saved, source: int) -> Tensor:
        """State ``source``, ``[N, H, W, C]``, a slice of the nodes from 2 on."""
        if source < 2:
            return saved.states[source]
        channels = saved.slots.shape[-1]
        return saved.nodes[..., (source - 2) * channels : (source - 1) * channels]

    def convolution(self, branch: Branch, half: int) -> Operation:
        """An operation with the geometry and weights of a half of a branch."""
        operation = Operation(branch.kind, branch.kernel, branch.dilation, branch.stride)
        operation.padding = branch.padding
        if half == 1:
            operation.stride = 1
        if branch.weights:
            give_weights(operation, self.weights.of(branch, half))
        return operation

    def skip(self, branch: Branch, saved: Saved) -> Operation:
        """A skip connection, with dropout if the cell has it and is in training."""
        operation = Operation(branch.kind, input=self.state(saved, branch.source))
        if self.plan.dropout and self.training:
            operation.stream = self.plan.index * plans.STREAMS_PER_CELL + branch.edge
        return operation

    def normalise(self, saved: Saved, rows: list[int]) -> tuple[Tensor, Tensor]:
        """float64 scale and shift ``[n, C]`` of rows of the statistics."""
        picked = saved.stats[rows]
        return moments.normalisation(picked[:, 0], picked[:, 1])

    def cast(self, saved: Saved, x: Tensor) -> Tensor:
        """float64 to the dtype in which the backend wants coefficients."""
        return x.to(self.backend.coefficient_dtype(saved.slots))  # type: ignore[call-overload]


def give_weights(operation: Operation, half: Half) -> None:
    """Puts the weights of a convolution half, and room for their gradients, on an operation."""
    operation.depthwise = half.depthwise
    operation.pointwise = half.pointwise
    operation.grad_depthwise = half.grad_depthwise
    operation.grad_pointwise = half.grad_pointwise
