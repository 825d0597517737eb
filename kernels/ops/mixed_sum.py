"""The mixed operation: a weighted sum of candidate outputs, in one pass over each.

``out = sum over i of weights[i] * outputs[i]``; backward reads every candidate once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import plan
from ..calls import Call, Item
from ..cell_operator import primitives_for
from ..interface import Arrays, Backend
from ..rows import refuse_second_derivative
from . import common

_SKIP = Item(plan.SKIP, 0, 1, 1, 0, -1, -1, -1, 0, 0, -1, -1, -1, 0, 0, -1)


@lru_cache(maxsize=256)
def _call(count: int) -> Call:
    """``count`` terms, each a plain array: what ``Backend.mix`` and ``reduce`` call skips."""
    return Call(tuple(_SKIP._replace(source=i, op=i) for i in range(count)), count)


class _NoWeights:
    """Stands for ``Arrays.weights`` where no item has any."""

    class layout:
        offsets: tuple[int, ...] = ()


def _arrays(states: list[Tensor], rows: Tensor) -> Arrays:
    return Arrays(
        y=rows[None],
        states=states,
        weights=_NoWeights(),  # type: ignore[arg-type]
        rate=torch.zeros(1, dtype=torch.float32, device=rows.device),
        state=torch.zeros(2, dtype=torch.int64, device=rows.device),
        channels=rows.shape[-1],
        training=False,
        grads=[],
    )


def _flat(x: Tensor, strides: tuple[int, ...], width: int) -> Tensor:
    """An image's elements in their order in memory, ``[N, 1, pixels, width]``, zero-padded.

    Where a term lies does not matter to a sum of terms that lie alike.
    """
    if x.stride() != strides:
        x = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
    x = x.detach()
    count = x[0].numel()
    elements = x.as_strided((x.shape[0], count), (strides[0], 1))
    missing = -count % width
    if missing:
        elements = F.pad(elements, (0, missing))
    return elements.view(x.shape[0], 1, -1, width)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of ``x`` where it is dense image by image, else those of a channels-last copy."""
    for order in ((1, 2, 3), (2, 3, 1)):
        expected = 1
        for dim in reversed(order):
            if x.shape[dim] != 1 and x.stride(dim) != expected:
                break
            expected *= x.shape[dim]
        else:
            if x.shape[0] == 1 or x.stride(0) == expected:
                return _dense(x.shape, order)
    return _dense(x.shape, (2, 3, 1))


def _dense(shape: torch.Size, order: tuple[int, ...]) -> tuple[int, ...]:
    strides, expected = [0] * 4, 1
    for dim in reversed((0, *order)):
        strides[dim] = expected
        expected *= shape[dim]
    return tuple(strides)


def _scaled_sum(
    backend: Backend, rows: list[Tensor], factors: Tensor, like: Tensor, strides: tuple[int, ...]
) -> Tensor:
    """``sum of factors * rows`` as an image of its own, with the shape of ``like``.

    Args:
        rows: Terms as ``_flat`` gives them.
        factors: ``[len(rows), width]``.
    """
    image = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
    out = _flat(image, strides, rows[0].shape[-1])
    shift = factors.new_zeros(out.shape[-1])
    backend.mix(_call(len(rows)), _arrays(rows, out), factors, shift, out)
    if out.data_ptr() != image.data_ptr():
        count = image[0].numel()
        elements = image.as_strided((like.shape[0], count), (strides[0], 1))
        elements.copy_(out.flatten(1)[:, :count])
    return image


def _factors(weights: Tensor, backend: Backend, rows: Tensor) -> Tensor:
    """One row a term, ``[n, width]``."""
    dtype = backend.coefficient_dtype(rows.dtype)
    return weights.detach().to(dtype)[:, None].expand(-1, rows.shape[-1]).contiguous()


@torch.library.custom_op("pdarts_fast::weighted_sum", mutates_args=())
def _weighted_sum(outputs: list[Tensor], weights: Tensor, backend: str) -> Tensor:
    """``weighted_sum`` of checked arguments."""
    first = outputs[0]
    primitives, strides = primitives_for(backend, first.dtype), _strides(first)
    width = primitives.channels(1)
    rows = [_flat(x, strides, width) for x in outputs]
    factors = _factors(weights, primitives, rows[0])
    return _scaled_sum(primitives, rows, factors, first, strides)


@_weighted_sum.register_fake
def _(outputs, weights, backend):
    first = outputs[0]
    return torch.empty_strided(first.shape, _strides(first), dtype=first.dtype, device=first.device)


@torch.library.custom_op("pdarts_fast::weighted_sum_backward", mutates_args=())
def _weighted_sum_backward(
    grad: Tensor, outputs: list[Tensor], weights: Tensor, backend: str, wants: list[bool]
) -> list[Tensor]:
    """Gradient of the weights, then of every candidate; empty where not in ``wants``."""
    first = outputs[0]
    primitives, strides = primitives_for(backend, first.dtype), _strides(first)
    width = primitives.channels(1)
    g = _flat(grad.to(first.dtype), strides, width)
    factors = _factors(weights, primitives, g)
    found = weights.new_empty(0)
    if wants[0]:
        rows = [_flat(x, strides, width) for x in outputs]
        sums = g.new_empty(1 + len(rows), width, dtype=torch.float64)
        primitives.reduce(_call(len(rows)), _arrays(rows, g), g, factors, factors, sums)
        found = sums[1:].sum(1).to(weights.dtype)
    grads = [
        _scaled_sum(primitives, [g], factor[None], first, strides) if want else first.new_empty(0)
        for factor, want in zip(factors, wants[1:], strict=True)
    ]
    return [found, *grads]


@_weighted_sum_backward.register_fake
def _(grad, outputs, weights, backend, wants):
    first = outputs[0]
    strides = _strides(first)
    grads = [
        torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
        if want
        else x.new_empty(0)
        for x, want in zip(outputs, wants[1:], strict=True)
    ]
    return [torch.empty_like(weights) if wants[0] else weights.new_empty(0), *grads]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    outputs, weights, ctx.backend = inputs
    ctx.save_for_backward(weights, *outputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weights, *outputs = ctx.saved_tensors
    wants = [ctx.needs_input_grad[1], *ctx.needs_input_grad[0]]
    of_weights, *grads = torch.ops.pdarts_fast.weighted_sum_backward(
        grad, outputs, weights, ctx.backend, wants
    )
    found = [one if want else None for one, want in zip(grads, wants[1:], strict=True)]
    return found, of_weights if wants[0] else None, None


_weighted_sum.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(
    _weighted_sum_backward,
    "weighted_sum has",
    "use weighted_sum_reference to differentiate its gradients",
)


def weighted_sum_reference(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``weighted_sum`` in plain torch: the specification."""
    total = outputs[0] * weights[0]
    for x, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + x * weight
    return total.to(outputs[0].dtype)


def weighted_sum(outputs: Sequence[Tensor], weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Mixed operation: ``sum over i of weights[i] * outputs[i]``.

    Args:
        outputs: Outputs of the candidate operations, at least one, ``[N, C, H, W]`` each, of one
            shape, device and dtype (float32, bfloat16 or float64), in any memory layout; fastest
            where all have the same dense one.
        weights: Their weights, ``[len(outputs)]``, in any floating dtype; sums are at least
            float32.
        backend: ``auto`` or a name of ``kernels.backends``. float64 always runs in plain torch.

    Returns:
        ``[N, C, H, W]`` in the dtype and, where that is dense, the layout of the first output.

    Raises:
        ValueError: Shapes, dtypes or devices do not go together.
        UsageError: The backend does not exist or cannot run here.

    Source:
        arXiv 1806.09055, equation 2.
    """
    outputs = list(outputs)
    if not outputs:
        raise ValueError("outputs: wanted at least one candidate, got none")
    for number, x in enumerate(outputs):
        common.check_images(x, f"outputs[{number}]")
        first = outputs[0]
        if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"outputs[{number}]: wanted {tuple(first.shape)} of {first.dtype} on "
                f"{first.device} like the first, got {tuple(x.shape)} of {x.dtype} on {x.device}"
            )
    if weights.shape != (len(outputs),) or not weights.is_floating_point():
        raise ValueError(
            f"weights: wanted {len(outputs)} floating numbers, got shape {tuple(weights.shape)} "
            f"of {weights.dtype}"
        )
    return torch.ops.pdarts_fast.weighted_sum(
        outputs, weights, common.resolve(backend, outputs[0].device, outputs[0].shape[1])
    )
