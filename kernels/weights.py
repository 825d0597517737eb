"""Between a cell's stock parameters and the matrices that the primitives multiply by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plan as plans
from .plan import Branch, Plan


@dataclass(slots=True)
class Half:
    """Weights of a convolution half, padded to the backend's channels, and their gradients.

    Attributes:
        depthwise: ``[C, kernel, kernel]``, None for a 1×1 convolution.
        pointwise: ``[C, Cx]``; ``[C, 2 Cx]`` for a factorized reduce: even, then odd pixels.
        grad_depthwise, grad_pointwise: Same shapes, to be written; None if nobody asks.
        indices: Into ``Plan.weights``.
    """

    depthwise: Tensor | None
    pointwise: Tensor
    indices: tuple[int, ...]
    grad_depthwise: Tensor | None = None
    grad_pointwise: Tensor | None = None


def _matrix(weight: Tensor, rows: int, columns: int) -> Tensor:
    matrix = weight.detach().flatten(1)
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return F.pad(matrix, missing) if any(missing) else matrix


class Weights:
    """All weights of a cell.

    Args:
        plan: The cell.
        parameters: In the order of ``plan.weights``.
        channels: Channels of the cell after padding.
        in_channels: Channels of both inputs after padding.
        dtype: Of the arithmetic.
        want_gradients: Whether to make room for gradients.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Tensor],
        channels: int,
        in_channels: tuple[int, int],
        dtype: torch.dtype,
        want_gradients: bool,
    ) -> None:
        self._plan = plan
        self._parameters = [p.detach().to(dtype).contiguous() for p in parameters]
        self._channels = channels
        self._halves: list[Half] = []
        self._inputs: list[Half] = []
        for which in (0, 1):
            indices = plan.input_weights(which)
            self._inputs.append(self._one_by_one(indices, in_channels[which]))
        self._of_branch: dict[tuple[int, int], tuple[Half, ...]] = {}
        for branch in plan.branches:
            key = (branch.edge, branch.op)
            if branch.kind == plans.CONV:
                pairs = (branch.weights[:2], branch.weights[2:])
                self._of_branch[key] = tuple(self._separable(pair) for pair in pairs if pair)
            elif branch.kind == plans.FACTORIZED:
                self._of_branch[key] = (self._one_by_one(branch.weights, channels),)
        if want_gradients:
            for half in self._halves:
                half.grad_pointwise = torch.zeros_like(half.pointwise)
                if half.depthwise is not None:
                    half.grad_depthwise = torch.zeros_like(half.depthwise)

    def of_input(self, which: int) -> Half:
        """The preprocessing of input 0 or 1."""
        return self._inputs[which]

    def of(self, branch: Branch, half: int = 0) -> Half:
        """The weights of a branch; ``half`` 1 is the second half of a separable convolution."""
        return self._of_branch[branch.edge, branch.op][half]

    def _separable(self, indices: tuple[int, ...]) -> Half:
        depthwise, pointwise = (self._parameters[i] for i in indices)
        channels, kernel = self._channels, depthwise.shape[-1]
        taps = _matrix(depthwise, channels, kernel * kernel).view(channels, kernel, kernel)
        half = Half(taps, _matrix(pointwise, channels, channels), indices)
        self._halves.append(half)
        return half

    def _one_by_one(self, indices: tuple[int, ...], depth: int) -> Half:
        parts = [self._parameters[i] for i in indices]
        if len(parts) == 1:
            half = Half(None, _matrix(parts[0], self._channels, depth), indices)
        else:
            even, odd = parts
            matrix = even.new_zeros(self._channels, 2 * depth)
            split = even.shape[0]
            matrix[:split, : even.shape[1]] = even.flatten(1)
            matrix[split : split + odd.shape[0], depth : depth + odd.shape[1]] = odd.flatten(1)
            half = Half(None, matrix, indices)
        self._halves.append(half)
        return half

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """All weight gradients, flattened one after the other in the order of the parameters."""
        parts: list[Tensor | None] = [None] * len(self._parameters)
        for half in self._halves:
            assert half.grad_pointwise is not None
            pointwise = half.grad_pointwise
            if half.grad_depthwise is not None:
                first, second = half.indices
                shape = self._parameters[first].shape
                parts[first] = half.grad_depthwise[: shape[0]]
                parts[second] = self._cut(pointwise, second, 0, 0)
            elif len(half.indices) == 2:
                first, second = half.indices
                parts[first] = self._cut(pointwise, first, 0, 0)
                split = self._parameters[first].shape[0]
                parts[second] = self._cut(pointwise, second, split, pointwise.shape[1] // 2)
            else:
                parts[half.indices[0]] = self._cut(pointwise, half.indices[0], 0, 0)
        return torch.cat([part.flatten() for part in parts if part is not None]).to(dtype)

    def _cut(self, matrix: Tensor, index: int, row: int, column: int) -> Tensor:
        rows, columns = self._parameters[index].shape[:2]
        return matrix[row : row + rows, column : column + columns]
