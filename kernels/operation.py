"""What a primitive is told about one operation; every backend reads the same record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import plan


@dataclass(slots=True)
class Operation:
    """One operation of one edge, or one half of a separable convolution.

    Arrays are channels-last; ``M = N * H * W`` counts output pixels. Each primitive of ``Backend``
    says which fields it reads.

    Attributes:
        kind: ``plan.CONV`` ... ``plan.SKIP``.
        stream: Dropout stream of a skip, -1 for none.
        depthwise: ``[C, 1, kernel, kernel]``.
        pointwise: ``[C, Cx]``; ``[C, 2 Cx]`` for a FACTORIZED: at even, then at odd pixels.
        y: ``[N, H, W, C]``: output before BatchNorm.
        input: ``[N, H, W, C]``: input of a second half or of a skip.
        scale, shift: ``[C]``.
        grad: Gradient of the node (or of the first half's output), ``[N, H, W, C]``.
        coef: ``dy = coef[0] * grad + coef[1] * y + coef[2]``, ``[3, C]``.
        grad_input: ``[N, H, W, C]``, written by ``mid_backward``.
        sums: float64 ``[2, C]``, written.
        grad_depthwise, grad_pointwise: Written; None if nobody asks.
    """

    kind: int
    kernel: int = 0
    dilation: int = 1
    stride: int = 1
    padding: int = 0
    stream: int = -1
    depthwise: Tensor | None = None
    pointwise: Tensor | None = None
    y: Tensor | None = None
    input: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    grad: Tensor | None = None
    coef: Tensor | None = None
    grad_input: Tensor | None = None
    sums: Tensor | None = None
    grad_depthwise: Tensor | None = None
    grad_pointwise: Tensor | None = None


@dataclass(slots=True)
class Dropout:
    """Rate (float32 ``[1]``), seed and step (int64 ``[2]``), and channels that count."""

    rate: Tensor | None
    state: Tensor | None
    channels: int


class Backend(Protocol):
    """The primitives of a cell. None allocates what it returns: outputs are fields."""

    def channels(self, count: int) -> int:
        """``count`` rounded up to what the primitives take; extra channels are zero."""
        ...

    def coefficient_dtype(self, storage: Tensor) -> object:
        """dtype of weights, scale, shift and coef for arrays of this dtype."""
        ...

    def fan_out(self, x: Tensor, operations: list[Operation]) -> None:
        """``y = W depthwise(relu(x))``, pools of x, 1×1 convolutions of relu(x); sums = mean, var."""
        ...

    def mid(self, operations: list[Operation]) -> None:
        """``y = W depthwise(relu(input * scale + shift))``; sums = mean, biased variance of y."""
        ...

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """``y = y * scale + shift`` in place."""
        ...

    def mix(
        self, operations: list[Operation], shift: Tensor, out: Tensor, dropout: Dropout
    ) -> None:
        """``out = shift + sum of scale * y``, or of ``scale * dropout(input)`` for a SKIP."""
        ...

    def reduce(
        self, grad: Tensor, operations: list[Operation], sums: Tensor, dropout: Dropout
    ) -> None:
        """``sums = sum of grad``; of an operation ``sums[0] = sum of grad * (y * scale + shift)``.

        A SKIP sums ``grad * dropout(input)``.
        """
        ...

    def mid_backward(self, operations: list[Operation]) -> None:
        """Backward of ``mid`` from dy: grad_input (masked by the ReLU), weight gradients.

        ``sums = sum of grad_input, sum of grad_input * relu(input * scale + shift)``.
        """
        ...

    def fan_in(
        self,
        x: Tensor,
        operations: list[Operation],
        incoming: Tensor | None,
        out: Tensor | None,
        dropout: Dropout,
    ) -> None:
        """Backward of ``fan_out`` and of skips: ``out = incoming + dx``, weight gradients."""
        ...


__all__ = ["Backend", "Dropout", "Operation", "plan"]
