"""Separable and dilated convolution blocks: ReLU, depthwise, pointwise, BN, once or twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import moments
from ..cell_operator import primitives_for
from ..interface import Backend
from ..rows import as_image, as_rows, copy_shape, fake_image, refuse_second_derivative
from . import common
from .block import BlockPass, Geometry, Stored, gains_table, running_norms
from .separable_reference import NormState

KERNELS, DILATIONS, STRIDES = (3, 5), (1, 2), (1, 2)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _geometry(weights: Sequence[Tensor], stride: int, dilation: int) -> Geometry:
    channels, _, kernel, _ = weights[0].shape
    return Geometry(channels, kernel, dilation, stride, len(weights) // 2)


def _empty_outputs(geometry: Geometry, backend: Backend, x: Tensor, empty: Any) -> Outputs:
    """Output, input as rows if that is a copy, slots, norms, statistics: uninitialised."""
    channels, halves = backend.channels(geometry.channels), geometry.halves
    size = geometry.out_size(*x.shape[2:])
    rows = copy_shape(x, x.dtype, channels)
    out = empty((x.shape[0], *size, geometry.channels), x, x.dtype).permute(0, 3, 1, 2)
    norms = x.new_empty((halves, 2, channels), dtype=torch.float64)
    return (
        out,
        empty(rows, x, x.dtype),
        empty((halves, x.shape[0], *size, channels), x, x.dtype),
        norms,
        torch.empty_like(norms),
    )


def _stored(x: Tensor, outputs: Sequence[Tensor], gains: Sequence[Tensor]) -> Stored:
    _, copy, slots, norms, _ = outputs
    rows = copy if copy.numel() else x.detach().permute(0, 2, 3, 1)
    return Stored(rows, slots, norms, gains_table(gains, slots.shape[-1]))


@torch.library.custom_op("pdarts_fast::separable", mutates_args=())
def _separable(
    x: Tensor,
    weights: list[Tensor],
    gains: list[Tensor],
    running: list[Tensor],
    stride: int,
    dilation: int,
    backend: str,
    training: bool,
) -> Outputs:
    """Output of checked arguments, then what the backward pass reads."""
    geometry = _geometry(weights, stride, dilation)
    primitives = primitives_for(backend, x.dtype)
    outputs = _empty_outputs(geometry, primitives, x, primitives.empty)
    channels = outputs[2].shape[-1]
    if outputs[1].numel():
        outputs[1].copy_(as_rows(x, x.dtype, channels))
    if not training:
        outputs[3].copy_(running_norms(running, channels))
    stored = _stored(x, outputs, gains)
    rows = outputs[0].permute(0, 2, 3, 1)
    padded = channels != geometry.channels
    target = primitives.empty((*rows.shape[:3], channels), x, x.dtype) if padded else rows
    with torch.autocast(x.device.type, enabled=False):
        block = BlockPass(primitives, geometry, stored, weights, training, False)
        block.forward(outputs[4], target)
    if padded:
        rows.copy_(target[..., : geometry.channels])
    return outputs


@_separable.register_fake
def _(x, weights, gains, running, stride, dilation, backend, training):
    primitives = primitives_for(backend, x.dtype)
    return _empty_outputs(
        _geometry(weights, stride, dilation),
        primitives,
        x,
        lambda shape, like, dtype: like.new_empty(shape, dtype=dtype),
    )


@torch.library.custom_op("pdarts_fast::separable_backward", mutates_args=())
def _separable_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gains: list[Tensor],
    outputs: list[Tensor],
    stride: int,
    dilation: int,
    backend: str,
    training: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weights (flat) and gains; empty where not in ``wants``."""
    geometry = _geometry(weights, stride, dilation)
    primitives = primitives_for(backend, x.dtype)
    stored = _stored(x, outputs, gains)
    channels = stored.slots.shape[-1]
    rows = as_rows(grad, x.dtype, channels)
    out = primitives.empty(tuple(stored.x.shape), x, x.dtype) if wants[0] else None
    with torch.autocast(x.device.type, enabled=False):
        block = BlockPass(primitives, geometry, stored, weights, training, wants[1])
        of_gains = block.backward(rows, out)
    grad_x = as_image(out, x)
    if not wants[1]:
        return grad_x, weights[0].new_empty(0), weights[0].new_empty(0)
    flat = block.arrays.weights.gradient().to(weights[0].dtype)
    of_gains = of_gains[..., : geometry.channels].to(weights[0].dtype)
    return grad_x, flat, of_gains.contiguous()


@_separable_backward.register_fake
def _(grad, x, weights, gains, outputs, stride, dilation, backend, training, wants):
    total = sum(weight.numel() for weight in weights)
    shape = (len(weights) // 2, 2, x.shape[1])
    return (
        fake_image(x, wants[0]),
        weights[0].new_empty(total if wants[1] else 0),
        weights[0].new_empty(shape if wants[1] else (0,)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, gains, running, ctx.stride, ctx.dilation, ctx.backend, ctx.training = inputs
    ctx.save_for_backward(x, *output, *weights, *gains)
    ctx.counts = len(output), len(weights), len(running)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    num_outputs, num_weights, num_running = ctx.counts
    outputs, rest = rest[:num_outputs], rest[num_outputs:]
    weights, gains = rest[:num_weights], rest[num_weights:]
    want_x, want_weights, want_gains = ctx.needs_input_grad[:3]
    of_weights: list[Tensor | None] = [None] * len(weights)
    of_gains: list[Tensor | None] = [None] * len(gains)
    nothing = [None] * num_running, *[None] * 4
    if grad is None:
        return None, of_weights, of_gains, *nothing
    wants = [want_x, any(want_weights) or any(want_gains)]
    grad_x, flat, table = torch.ops.pdarts_fast.separable_backward(
        grad, x, weights, gains, outputs, ctx.stride, ctx.dilation, ctx.backend, ctx.training, wants
    )
    if wants[1]:
        parts = flat.split([weight.numel() for weight in weights])
        of_weights = [
            part.view(weight.shape) if want else None
            for part, weight, want in zip(parts, weights, want_weights, strict=True)
        ]
    if any(want_gains):
        found = table.flatten(0, 1).unbind()
        of_gains = [one if want else None for one, want in zip(found, want_gains, strict=True)]
    return grad_x if want_x else None, of_weights, of_gains, *nothing


_separable.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(
    _separable_backward,
    "sep_conv and dil_conv have",
    "use separable_reference to differentiate their gradients",
)


@torch.library.custom_op("pdarts_fast::separable_update", mutates_args=("running", "batches"))
def _separable_update(
    running: list[Tensor], batches: list[Tensor], stats: Tensor, count: int
) -> None:
    """Moves running means and variances (alternately) towards those of the batch.

    Args:
        stats: Mean and biased variance, float64 ``[halves, 2, C]``, C with padding.
        count: Pixels of the batch.
    """
    targets = stats[..., : running[0].numel()].clone()
    targets[:, 1] = moments.unbiased(targets[:, 1], count)
    rows = targets.to(running[0].dtype).flatten(0, 1).unbind()
    torch._foreach_lerp_(running, list(rows), moments.MOMENTUM)
    if batches:
        torch._foreach_add_(batches, 1)


@_separable_update.register_fake
def _(running, batches, stats, count):
    return None


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[NormState],
    stride: int,
    dilation: int,
    training: bool,
) -> None:
    """Refuses what the kernels do not compute.

    Raises:
        ValueError: Names the argument, what it was and what is wanted.
    """
    common.check_images(x, "x")
    channels, kernel = x.shape[1], weights[0].shape[-1]
    if kernel not in KERNELS or dilation not in DILATIONS or stride not in STRIDES:
        raise ValueError(
            f"wanted a kernel of 3 or 5, dilation 1 or 2, stride 1 or 2, got kernel {kernel}, "
            f"dilation {dilation}, stride {stride}"
        )
    for number, weight in enumerate(weights):
        shape = (channels, channels, 1, 1) if number % 2 else (channels, 1, kernel, kernel)
        if tuple(weight.shape) != shape or weight.device != x.device:
            raise ValueError(
                f"weights[{number}]: wanted {shape} on {x.device}, got {tuple(weight.shape)} on "
                f"{weight.device}"
            )
    affine = {norm.weight is not None for norm in norms} | {n.bias is not None for n in norms}
    if len(affine) != 1:
        raise ValueError("norms: wanted weight and bias of every norm, or none at all")
    for number, norm in enumerate(norms):
        vectors = [v for v in (*norm[:2], *norm[3:]) if v is not None]
        if any(vector.shape != (channels,) for vector in vectors):
            raise ValueError(f"norms[{number}]: wanted {channels} channels like x")
    pixels = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    if training and pixels < 2:
        raise ValueError(
            f"x: BatchNorm in training wants more than one value a channel, got {tuple(x.shape)}"
        )


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[NormState | nn.BatchNorm2d],
    stride: int,
    dilation: int,
    training: bool,
    backend: str,
) -> Tensor:
    states = [n if isinstance(n, NormState) else NormState.of(n) for n in norms]
    x = common.in_autocast(x)
    _check(x, weights, states, stride, dilation, training)
    widest = max(weight.shape[0] for weight in weights)
    chosen = common.resolve(backend, x.device, widest)
    gains = [g for state in states for g in (state.weight, state.bias) if g is not None]
    running = [b for state in states for b in (state.running_mean, state.running_var)]
    out, _, _, _, stats = torch.ops.pdarts_fast.separable(
        x, list(weights), gains, [] if training else running, stride, dilation, chosen, training
    )
    if training:
        batches = [s.num_batches_tracked for s in states if s.num_batches_tracked is not None]
        count = out[:, 0].numel()
        torch.ops.pdarts_fast.separable_update(running, batches, stats, count)
    return out


def sep_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[NormState | nn.BatchNorm2d],
    *,
    stride: int = 1,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Separable convolution: (ReLU, depthwise, pointwise, BN) twice, the first with the stride.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float64; fastest channels-last with C a multiple
            of the processor's vector width. Under autocast float32 becomes its dtype.
        weights: Depthwise ``[C, 1, k, k]`` and pointwise ``[C, C, 1, 1]`` of the first half, then
            of the second; k is 3 or 5.
        norms: Both BatchNorms, both with a scale and a shift or both without.
        stride: 1 or 2.
        training: Normalise by the batch and update running statistics; else by those.
        backend: ``auto`` or a name of ``kernels.backends``. float64 always runs in plain torch.

    Returns:
        ``[N, C, ceil(H / stride), ceil(W / stride)]`` in the dtype of ``x``, channels-last.

    Raises:
        ValueError: Shapes, dtypes or settings that the kernels do not compute.
        UsageError: The backend does not exist or cannot run here.

    Source:
        arXiv 1806.09055, section 3.1.
    """
    if len(weights) != 4 or len(norms) != 2:
        raise ValueError(
            f"sep_conv: wanted 4 weights and 2 norms, got {len(weights)} and {len(norms)}"
        )
    return _run(x, weights, norms, stride, 1, training, backend)


def dil_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: NormState | nn.BatchNorm2d,
    *,
    stride: int = 1,
    dilation: int = 2,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Dilated convolution: ``BN(pointwise(depthwise(relu(x))))``.

    Args:
        x: As for ``sep_conv``.
        weights: Depthwise ``[C, 1, k, k]`` and pointwise ``[C, C, 1, 1]``; k is 3 or 5.
        norm: The BatchNorm.
        stride, dilation: 1 or 2.
        training, backend: As for ``sep_conv``.

    Returns:
        As ``sep_conv``.

    Raises:
        ValueError: Shapes, dtypes or settings that the kernels do not compute.
        UsageError: The backend does not exist or cannot run here.

    Source:
        arXiv 1806.09055, section 3.1.
    """
    if len(weights) != 2:
        raise ValueError(f"dil_conv: wanted 2 weights, got {len(weights)}")
    return _run(x, weights, [norm], stride, dilation, training, backend)
