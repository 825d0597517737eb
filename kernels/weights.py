"""A cell's parameters as one flat array, which all primitives index.

Weight i begins at ``offsets[i]``. Depthwise weights are ``[C, kernel, kernel]``, pointwise ones
``[C, Cx]``; the two convolutions of a factorized reduce follow one another and are a single
``[C, Cx]`` whose first ``C // 2`` rows read the even pixels. Without padding of channels the flat
array is just the parameters in order, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten

from . import plan as plans
from .plan import Plan


class Layout:
    """Where every weight of a plan lies.

    Args:
        plan: The cell.
        channels: Channels of the cell after padding.
        in_channels: Channels of both inputs after padding.

    Attributes:
        offsets: Of every weight, in elements.
        shapes: Rows and columns of every weight without padding.
        padded: Rows and columns with padding. The second weight of a factorized reduce has what
            rows the first leaves.
        total: Length of the flat array.
        is_plain: Whether nothing is padded.
    """

    def __init__(self, plan: Plan, channels: int, in_channels: tuple[int, int]) -> None:
        kernels: dict[int, int] = {}
        pairs = [] if not plan.reduction_prev else [plan.input_weights(0)]
        for branch in plan.branches:
            if branch.kind == plans.CONV:
                kernels.update((i, branch.kernel**2) for i in branch.weights[::2])
            elif branch.kind == plans.FACTORIZED:
                pairs.append(branch.weights)
        real, padded = plan.channels, channels
        depths = {
            weight: (plan.in_channels[which], in_channels[which])
            for which in (0, 1)
            for weight in plan.input_weights(which)
        }
        self.shapes: list[tuple[int, int]] = []
        self.padded: list[tuple[int, int]] = []
        firsts, seconds = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
        for i in range(len(plan.weights)):
            rows, full = real, padded
            if i in firsts:
                rows = full = real // 2
            elif i in seconds:
                rows, full = real - real // 2, padded - real // 2
            columns, wide = (
                (kernels[i], kernels[i]) if i in kernels else depths.get(i, (real, padded))
            )
            self.shapes.append((rows, columns))
            self.padded.append((full, wide))
        self._place()

    def _place(self) -> None:
        """Offsets and total length from the padded shapes."""
        sizes = [rows * columns for rows, columns in self.padded]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.total = sum(sizes)
        self.is_plain = self.shapes == self.padded


@lru_cache(maxsize=1024)
def layout(key: str, channels: int, in_channels: tuple[int, int]) -> Layout:
    """The layout of the plan ``key``, made once."""
    return Layout(plans.from_key(key), channels, in_channels)


class Weights:
    """The weights of a cell, and room for their gradients.

    Args:
        where: The layout.
        parameters: In the order of ``Plan.weights``; or ``everything`` of an earlier pass.
        dtype: Of the arithmetic.
        want_gradients: Whether to make room for gradients.
        length: Of ``everything``, if a backend keeps more than the weights from pass to pass.

    Attributes:
        layout, parameters: As given.
        grad: ``[total]``, or None. Primitives write every element.
    """

    def __init__(
        self,
        where: Layout,
        parameters: Sequence[Tensor] | Tensor,
        dtype: torch.dtype,
        want_gradients: bool,
        length: int = 0,
    ) -> None:
        self.layout = where
        self.parameters = parameters
        self._dtype, self._length = dtype, max(length, where.total)
        self.grad: Tensor | None = None
        if want_gradients:
            like = parameters if isinstance(parameters, Tensor) else parameters[0]
            self.grad = like.new_zeros(where.total, dtype=dtype)

    @cached_property
    def everything(self) -> Tensor:
        """All weights and what a backend keeps behind them: made when first asked for."""
        if isinstance(self.parameters, Tensor):
            return self.parameters
        return self._packed(self.layout, self.parameters, self._dtype, self._length)

    @cached_property
    def flat(self) -> Tensor:
        """All weights, ``[total]``."""
        plain = self.everything.numel() == self.layout.total
        return self.everything if plain else self.everything[: self.layout.total]

    @property
    def extra(self) -> Tensor:
        """What is kept behind ``flat``."""
        return self.everything[self.layout.total :]

    @property
    def made(self) -> Tensor:
        """For the backward pass: ``everything`` if a pass asked for it, else an empty tensor."""
        asked = "everything" in vars(self) or not len(self.parameters)
        return self.everything if asked else self.parameters[0].new_empty(0)

    @staticmethod
    def _packed(
        where: Layout, parameters: Sequence[Tensor], dtype: torch.dtype, length: int
    ) -> Tensor:
        """All parameters with padding, one after the other, and room behind them."""
        with torch.no_grad():
            if not where.is_plain:
                parameters = [
                    F.pad(
                        parameter.reshape(shape),
                        (0, padded[1] - shape[1], 0, padded[0] - shape[0]),
                    )
                    for parameter, shape, padded in zip(
                        parameters, where.shapes, where.padded, strict=True
                    )
                ]
            if length == where.total:
                return flatten(parameters).to(dtype)
            everything = parameters[0].new_empty(length, dtype=dtype)
            flat = [parameter.reshape(-1) for parameter in parameters]
            torch.cat(flat, out=everything[: where.total])
            return everything

    def matrix(self, index: int) -> Tensor:
        """Weight ``index`` as ``[rows, columns]``: a view."""
        return self._view(self.flat, index)

    def grad_matrix(self, index: int) -> Tensor:
        """Gradient of weight ``index``: a view to write to.

        Raises:
            ValueError: There is no room for gradients.
        """
        if self.grad is None:
            raise ValueError("these weights have no room for gradients")
        return self._view(self.grad, index)

    def _view(self, flat: Tensor, index: int) -> Tensor:
        rows, columns = self.layout.padded[index]
        begin = self.layout.offsets[index]
        return flat[begin : begin + rows * columns].view(rows, columns)

    def gradient(self) -> Tensor:
        """All gradients without padding, one after the other in the order of the parameters."""
        assert self.grad is not None
        if self.layout.is_plain:
            return self.grad
        parts = [
            self.grad_matrix(i)[:rows, :columns].reshape(-1)
            for i, (rows, columns) in enumerate(self.layout.shapes)
        ]
        return torch.cat(parts)
