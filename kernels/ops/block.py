"""Passes of a block (ReLU, depthwise, pointwise, BN) over the primitives of any backend.

A separable convolution is two blocks, of which the first alone has the stride; a dilated one is
one. ``calls`` and ``moments`` explain tables and algebra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import moments, plan
from ..calls import Call, Item
from ..interface import Arrays, Backend
from ..weights import Layout, Weights


@dataclass(frozen=True)
class Geometry:
    """Static numbers of a block.

    Attributes:
        channels: C of input and output.
        kernel, dilation, stride: Of the depthwise convolutions; the stride of the first.
        halves: 2 for a separable convolution, 1 for a dilated one.
    """

    channels: int
    kernel: int
    dilation: int
    stride: int
    halves: int

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        return -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True)
class _Calls:
    first: Call
    second: Call
    last: Call
    middle: Call


@lru_cache(maxsize=256)
def _calls(geometry: Geometry) -> _Calls:
    """First half; second half; the last one as it enters the output, the first as if it did."""
    g, separable = geometry, geometry.halves == 2
    padding = g.dilation * (g.kernel - 1) // 2
    half = 0 if separable else -1
    first = Item(
        plan.CONV, g.kernel, g.dilation, g.stride, padding, -1, 0, -1, 0, 0, half, 0, 1, 0, 0, 0
    )
    second = first._replace(
        stride=1, slot=1, input=0, depthwise=2, pointwise=3, norm=1, input_norm=0
    )
    last = second if separable else first
    return _Calls(*(Call((item,), 1) for item in (first, second, last, first)))


class _BlockLayout(Layout):
    """Where a block's weights lie: depthwise and pointwise of every half."""

    def __init__(self, geometry: Geometry, padded: int) -> None:
        taps, real = geometry.kernel**2, geometry.channels
        self.shapes = [(real, taps), (real, real)] * geometry.halves
        self.padded = [(padded, taps), (padded, padded)] * geometry.halves
        self._place()


_layout = lru_cache(maxsize=256)(_BlockLayout)


@dataclass
class Stored:
    """What the backward pass reads; C is padded to the backend's channels.

    Attributes:
        x: Input, ``[N, H, W, C]``.
        slots: Outputs before BatchNorm, ``[halves, N, H', W', C]``.
        norms: Scale and shift of plain BatchNorm, float64 ``[halves, 2, C]``.
        gains: gamma and beta, float64 ``[halves, 2, C]``; None without.
    """

    x: Tensor
    slots: Tensor
    norms: Tensor
    gains: Tensor | None

    def affine(self, half: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of a half's BatchNorm with gamma and beta, float64 ``[1, C]``."""
        scale, shift = self.norms[half : half + 1].unbind(1)
        if self.gains is None:
            return scale, shift
        gamma, beta = self.gains[half : half + 1].unbind(1)
        return gamma * scale, gamma * shift + beta

    def gamma(self, half: int) -> Tensor | None:
        """``[1, C]``."""
        return None if self.gains is None else self.gains[half : half + 1, 0]


def _table(tensors: Sequence[Tensor], channels: int) -> Tensor:
    """Pairs of ``[C]`` vectors as float64 ``[pairs, 2, channels]``, zero-padded."""
    rows = torch.stack([tensor.detach() for tensor in tensors])
    table = rows.new_zeros(len(tensors) // 2, 2, channels, dtype=torch.float64)
    table[..., : rows.shape[1]] = rows.view(-1, 2, rows.shape[1])
    return table


def gains_table(gains: Sequence[Tensor], channels: int) -> Tensor | None:
    """``Stored.gains`` of gamma and beta of every half."""
    return _table(gains, channels) if gains else None


def running_norms(running: Sequence[Tensor], channels: int) -> Tensor:
    """``Stored.norms`` of running mean and variance of every half."""
    return moments.normalisation(_table(running, channels))


class BlockPass:
    """One forward or backward pass.

    Args:
        backend: Runs the primitives.
        geometry: The block.
        stored: Arrays to write in a forward pass, to read in a backward pass.
        weights: Of every half depthwise ``[C, 1, k, k]`` and pointwise ``[C, C, 1, 1]``.
        training: Batch statistics, or ``stored.norms`` as it is.
        want_weights: Whether gradients of weights (and gains) are wanted.
    """

    def __init__(
        self,
        backend: Backend,
        geometry: Geometry,
        stored: Stored,
        weights: Sequence[Tensor],
        training: bool,
        want_weights: bool,
    ) -> None:
        self.backend, self.stored, self.training = backend, stored, training
        self.calls, self.halves = _calls(geometry), geometry.halves
        self.dtype = backend.coefficient_dtype(stored.slots.dtype)
        device = stored.slots.device
        self.arrays = Arrays(
            y=stored.slots,
            states=[stored.x],
            weights=Weights(
                _layout(geometry, stored.slots.shape[-1]), weights, self.dtype, want_weights
            ),
            rate=torch.zeros(1, dtype=torch.float32, device=device),
            state=torch.zeros(2, dtype=torch.int64, device=device),
            channels=geometry.channels,
            training=False,
            grads=[],
        )

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()

    def forward(self, stats: Tensor, out: Tensor) -> None:
        """Fills ``stored.slots`` and, in training, ``stored.norms``.

        Args:
            stats: Mean and biased variance of the batch, float64 ``[halves, 2, C]``, written.
            out: Output, ``[N, H', W', C]``, written.
        """
        self.backend.fan_out(self.calls.first, self.arrays, self.stored.x, stats[:1])
        self._remember(0, stats)
        if self.halves == 2:
            scale, shift = map(self._cast, self.stored.affine(0))
            self.backend.mid(self.calls.second, self.arrays, scale, shift, stats[1:])
            self._remember(1, stats)
        scale, shift = map(self._cast, self.stored.affine(self.halves - 1))
        self.backend.mix(self.calls.last, self.arrays, scale, shift[0], out)

    def _remember(self, half: int, stats: Tensor) -> None:
        if self.training:
            row = slice(half, half + 1)
            self.stored.norms[row] = moments.normalisation(stats[row])

    def backward(self, grad: Tensor, out: Tensor | None) -> Tensor:
        """Gradients of input, gains and (in ``arrays.weights``) weights.

        Args:
            grad: Of the output, ``[N, H', W', C]``.
            out: Gradient of the input, ``[N, H, W, C]``, written; None if nobody asks.

        Returns:
            Gradient of gamma and beta, float64 ``[halves, 2, C]``.
        """
        stored, arrays = self.stored, self.arrays
        count, channels = grad[..., 0].numel(), grad.shape[-1]
        of_gains = stored.norms.new_zeros(self.halves, 2, channels)
        arrays.grads = [grad]
        coef = self._settle(self.halves - 1, self.calls.last, grad, count, of_gains)
        if self.halves == 2:
            shape = (1, *stored.slots.shape[1:])
            arrays.half_grads = self.backend.empty(shape, grad, stored.slots.dtype)
            sums = stored.norms.new_empty(1, 2, channels)
            scale, shift = map(self._cast, stored.affine(0))
            self.backend.mid_backward(
                self.calls.second, arrays, scale, shift, self._cast(coef), sums
            )
            # Without a gain the sum with the normalised output is that with plain BN(y); with
            # one, dividing by gamma would lose digits where gamma is small.
            if stored.gains is None:
                coef = moments.backward_coefficients(
                    None, stored.norms[:1], sums[:, 0], sums[:, 1], count, training=self.training
                )
            else:
                half = arrays.half_grads[0]
                coef = self._settle(0, self.calls.middle, half, count, of_gains)
        self.backend.fan_in(self.calls.first, arrays, stored.x, self._cast(coef), None, out)
        return of_gains

    def _settle(self, half: int, call: Call, grad: Tensor, count: int, of_gains: Tensor) -> Tensor:
        """Coefficients of a half's dy from the gradient of its output; fills ``of_gains``."""
        norm = self.stored.norms[half : half + 1]
        scale, shift = map(self._cast, norm.unbind(1))
        sums = norm.new_empty(2, grad.shape[-1])
        self.backend.reduce(call, self.arrays, grad, scale, shift, sums)
        of_gains[half, 0], of_gains[half, 1] = sums[1], sums[0]
        return moments.backward_coefficients(
            self.stored.gamma(half), norm, sums[0], sums[1:], count, training=self.training
        )
