"""The primitives that a backend gives, and the arrays they work on.

Arrays are channels-last and contiguous, ``[N, H, W, C]``, or slices of channels of such. M counts
the pixels ``N * H * W`` of an output. C is padded to what the backend takes; extra channels hold
zeros throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from .calls import Call
from .plan import Plan
from .weights import Layout, Weights

if TYPE_CHECKING:
    from .cell_pass import Saved


@dataclass(slots=True)
class Masks:
    """Skip dropout by masks that were drawn before, in place of rate and state.

    Attributes:
        kept: uint8 ``[masks, N, H, W, C]``, 1 where an element is kept; by ``Item.mask``.
        factors: float64 ``[masks]``: what is kept is multiplied by.
    """

    kept: Tensor
    factors: Tensor


@dataclass(slots=True)
class Arrays:
    """What all calls of a pass share.

    Attributes:
        y: Outputs before BatchNorm, ``[slots, N, H, W, C]``.
        states: State of every source so far, ``[N, H, W, C]`` each.
        weights: Of the whole cell, with room for gradients if they are wanted.
        rate, state: Of the skip dropout: float32 ``[1]``, int64 ``[2]``.
        channels: C without padding: what the dropout stream counts.
        training: Without it skips have no dropout, and whole passes take running statistics.
        grads: Gradient of every node, ``[N, H, W, C]`` each; backward only.
        half_grads: Gradient of every first half's normalised output, ``[halves, N, H, W, C]``.
        masks: Of the skip dropout, for an ``AnyCell`` alone.
    """

    y: Tensor
    states: list[Tensor]
    weights: Weights
    rate: Tensor
    state: Tensor
    channels: int
    training: bool
    grads: list[Tensor]
    half_grads: Tensor | None = None
    masks: Masks | None = None


class Backend(Protocol):
    """The primitives of a cell. ``n`` is the number of a call's items."""

    def channels(self, count: int) -> int:
        """``count`` rounded up to what the primitives take."""
        ...

    def coefficient_dtype(self, storage: torch.dtype) -> torch.dtype:
        """dtype of weights and coefficients for arrays of a dtype."""
        ...

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised array on the device of ``like``."""
        ...

    def fan_out(self, call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
        """All that leaves a state: ``y = W depthwise(relu(x))``, pools of x, ``y = W relu(x)``.

        Args:
            call: Slots that ``arrays.y`` gets.
            x: The state, ``[N, H, W, Cx]``.
            sums: Mean and biased variance of every y, float64 ``[n, 2, C]``, written.
        """
        ...

    def mid(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
        """Second halves: ``y = W depthwise(relu(input * scale + shift))``.

        Args:
            scale, shift: ``[n, C]``.
            sums: As for ``fan_out``.
        """
        ...

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """``y = y * scale + shift`` in place, scale and shift ``[C]``."""
        ...

    def mix(self, call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, out: Tensor) -> None:
        """A node: ``out = shift + sum of scale * y``, of ``scale * dropout(x)`` for a skip.

        Args:
            scale: ``[n, C]``.
            shift: ``[C]``.
        """
        ...

    def reduce(
        self,
        call: Call,
        arrays: Arrays,
        grad: Tensor,
        scale: Tensor,
        shift: Tensor,
        sums: Tensor,
    ) -> None:
        """Batch sums of a node's gradient with everything that enters the node.

        Args:
            scale, shift: ``[n, C]``.
            sums: float64 ``[1 + n, C]``, written: sum of grad, then of every item the sum of
                ``grad * (y * scale + shift)``, or of ``grad * dropout(x)`` for a skip.
        """
        ...

    def mid_backward(
        self,
        call: Call,
        arrays: Arrays,
        scale: Tensor,
        shift: Tensor,
        coef: Tensor,
        sums: Tensor,
    ) -> None:
        """Backward of ``mid`` into ``arrays.half_grads`` (masked by the ReLU) and the weights.

        Args:
            scale, shift: As for ``mid``.
            coef: ``dy = coef[0] * grad + coef[1] * y + coef[2]``, ``[n, 3, C]``.
            sums: Sum of the half's gradient, and of its product with the normalised output,
                float64 ``[n, 2, C]``, written.
        """
        ...

    def fan_in(
        self,
        call: Call,
        arrays: Arrays,
        x: Tensor,
        coef: Tensor,
        incoming: Tensor | None,
        out: Tensor | None,
    ) -> None:
        """Backward of ``fan_out`` and of skips, into ``out`` and the weights.

        Args:
            x: The state.
            coef: As for ``mid_backward``, of the first half where there are two; row 0 is the
                factor of a skip. ``[n, 3, C]``.
            incoming: Gradient to add, ``[N, H, W, Cx]``, or None.
            out: Gradient of x, written; None if nobody asks.
        """
        ...


class WholeCell(Protocol):
    """What a backend may offer instead of being called a primitive at a time."""

    def extra_slots(self, plan: Plan) -> int:
        """Arrays behind the slots that the forward pass keeps for the backward pass.

        Negative where some slots are kept nowhere: ``Saved.slots`` then has the others in order.
        """
        ...

    def kept_weights(self, where: Layout, parameters: Sequence[Tensor], dtype: torch.dtype) -> int:
        """Length of ``Weights.everything``, which the forward pass keeps for the backward pass.

        0 if both read parameters where they are and never ask for ``Weights.flat``.

        Args:
            dtype: Of the arrays.
        """
        ...

    def forward(
        self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor, stats: Tensor
    ) -> None:
        """What ``cell_forward.Forward.run`` does.

        Args:
            alphas: Weights of the operations, ``[edges, ops]``.
            stats: float64 ``[rows, 2, C]``, written in training.
        """
        ...

    def backward(
        self,
        plan: Plan,
        saved: Saved,
        arrays: Arrays,
        alphas: Tensor,
        grad: Tensor,
        want_inputs: tuple[bool, bool],
    ) -> tuple[list[Tensor | None], Tensor]:
        """What ``cell_backward.Backward.run`` does.

        Args:
            grad: Of the nodes, ``[N, H, W, steps * C]``, contiguous.
            want_inputs: Whether the gradient of each input is wanted.

        Returns:
            The inputs' gradients, None where not wanted; the alphas', ``[edges * ops]``, float64
            or float32.
            Those of the weights are written if ``arrays.weights`` has room.
        """
        ...

    def move_running(
        self,
        plan: Plan,
        running: list[Tensor],
        batches: list[Tensor],
        stats: Tensor,
        counts: list[int],
    ) -> bool:
        """What ``running.move_statistics`` does, unless it returns False."""
        ...


@runtime_checkable
class AnyCell(WholeCell, Protocol):
    """A ``WholeCell`` that takes plans without a key, too, and ``Arrays.masks``."""

    def draw(self, kept: Tensor, channels: int, probabilities: Sequence[float]) -> bool:
        """Draws masks as ``bernoulli_`` draws them from torch's generator of the CPU.

        Args:
            kept: uint8 ``[masks, N, H, W, C]``, written unless it returns False.
            channels: C without padding.
            probabilities: Of keeping an element, by mask, between 0 and 1 exclusively.

        Returns:
            False if it cannot draw what torch draws.
        """
        ...
