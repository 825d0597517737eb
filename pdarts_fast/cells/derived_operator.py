"""A derived cell as operators of torch: forward, backward, fake implementations, autograd.

As ``kernels.cell_operator``, for cells with two operations a node, affine BatchNorm and drop-path.
Drop-path masks are drawn outside of the operators, by torch's own generator and in the order in
which the modules would draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdarts_fast.cells import arrays
from pdarts_fast.cells.arrays import Empty
from pdarts_fast.cells.context import Context, Stored
from pdarts_fast.cells.derived_plan import from_key, masked_places
from pdarts_fast.cells.passes import CellForward
from pdarts_fast.cells.passes_backward import CellBackward
from pdarts_fast.cells.plan import CellPlan
from pdarts_fast.cells.tables import Tables, tables
from pdarts_fast.kernels.cell_operator import primitives_for
from pdarts_fast.kernels.interface import Backend
from pdarts_fast.kernels.rows import (
    as_image,
    as_rows,
    copy_shape,
    fake_image,
    refuse_second_derivative,
)
from pdarts_fast.kernels.running import move_statistics

Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


def _empty_outputs(
    plan: CellPlan,
    backend: Backend,
    s0: Tensor,
    s1: Tensor,
    dtype: torch.dtype,
    training: bool,
    empty: Empty,
) -> Outputs:
    """Arrays for the results of ``derived_forward``, uninitialised, from ``empty``."""
    batch, channels = s1.shape[0], backend.channels(plan.channels)
    copies = [
        empty(copy_shape(s, dtype, depth), s1, dtype)
        for s, depth in zip((s0, s1), arrays.depths(plan, backend), strict=True)
    ]
    *of_states, of_nodes = arrays.sizes(plan, s0, s1)
    states = [empty((batch, *size, channels), s1, dtype) for size in of_states]
    raw = [empty((batch, *size, channels), s1, dtype) for size in of_states]
    nodes = empty((batch, *of_nodes, plan.steps * channels), s1, dtype)
    slots = empty((plan.num_slots, batch, *of_nodes, channels), s1, dtype)
    rows = (plan.num_slots + 2 if training else len(plan.norms)) + 1
    norms = s1.new_empty((rows, 2, channels), dtype=torch.float64)
    measured = plan.num_slots + 2 if training else 0
    stats = s1.new_empty((measured, 2, channels), dtype=torch.float64)
    if arrays.whole_output(plan, channels):
        out, nodes = nodes.permute(0, 3, 1, 2), nodes.new_empty(0)
    else:
        shape = (batch, *of_nodes, len(plan.concat) * plan.channels)
        out = empty(shape, s1, dtype).permute(0, 3, 1, 2)
    depths = arrays.depths(plan, backend)
    total = arrays.layout(plan, channels, (depths[0], depths[1])).total
    flat = s1.new_empty(total, dtype=backend.coefficient_dtype(dtype))
    return (out, *copies, *states, *raw, nodes, slots, norms, stats, flat)  # type: ignore[return-value]


def _stored(
    plan: CellPlan, s0: Tensor, s1: Tensor, outputs: Sequence[Tensor], gains: Sequence[Tensor]
) -> Stored:
    """The arrays of a pass, where outputs hold no copy from what they alias."""
    out, copy0, copy1, state0, state1, raw0, raw1, nodes, slots, norms, *_ = outputs
    inputs = [
        copy if copy.numel() else s.detach().permute(0, 2, 3, 1)
        for s, copy in zip((s0, s1), (copy0, copy1), strict=True)
    ]
    if not nodes.numel():
        nodes = out.detach().permute(0, 2, 3, 1)
    table = arrays.gains(plan, [True] * len(plan.norms), gains, slots.shape[-1])
    return Stored(inputs, [state0, state1], [raw0, raw1], nodes, slots, norms, table)


def _pass(
    plan: CellPlan, masks: Tensor, dtype: torch.dtype, training: bool
) -> tuple[Context, Tables]:
    drop_path = 1.0 if masks.numel() else 0.0
    context = Context(
        plan,
        masks.device,
        training,
        {},
        {},
        drop_path,
        image_dtype=dtype,
        autocast=None,
        record=False,
        drawn=True,
    )
    if masks.numel():
        factors = masks.to(dtype)[..., None, None, None]
        context.masks = dict(zip(masked_places(plan), factors, strict=True))
    return context, tables(plan, frozenset(), bool(masks.numel()))


@torch.library.custom_op("pdarts_fast::derived_forward", mutates_args=())
def derived_forward(
    s0: Tensor,
    s1: Tensor,
    weights: list[Tensor],
    gains: list[Tensor],
    running: list[Tensor],
    masks: Tensor,
    key: str,
    backend: str,
    training: bool,
    dtype: torch.dtype,
) -> Outputs:
    """A cell of the plan ``key``: output, then what the backward pass reads (``_stored``).

    Args:
        masks: Factor of every operation behind drop-path and image, ``[operations, N]``; empty
            without drop-path.
    """
    plan, primitives = from_key(key), primitives_for(backend, dtype)
    outputs = _empty_outputs(plan, primitives, s0, s1, dtype, training, primitives.empty)
    channels = primitives.channels(plan.channels)
    depths = arrays.depths(plan, primitives)
    for s, copy, depth in zip((s0, s1), outputs[1:3], depths, strict=True):
        if copy.numel():
            copy.copy_(as_rows(s, dtype, depth))
    norms = (
        arrays.batch_norms(plan, channels, s1.device)
        if training
        else arrays.running_norms(plan, running, channels)
    )
    outputs[9].copy_(norms)
    stored = _stored(plan, s0, s1, outputs, gains)
    context, found = _pass(plan, masks, dtype, training)
    shared = arrays.primitives_arrays(
        plan, found, primitives, stored, weights, want_gradients=False
    )
    alphas = s1.new_ones((len(plan.sizes), 1), dtype=torch.float64)
    driver = CellForward(primitives, context, found, stored, shared, alphas)
    with torch.autocast(s1.device.type, enabled=False):
        driver.run()
    if training:
        outputs[10].copy_(driver.stats)
    outputs[11].copy_(shared.weights.flat)
    if outputs[7].numel():
        arrays.write_output(plan, stored.nodes, outputs[0])
    return outputs


@derived_forward.register_fake
def _(s0, s1, weights, gains, running, masks, key, backend, training, dtype):
    plan, primitives = from_key(key), primitives_for(backend, dtype)
    return _empty_outputs(plan, primitives, s0, s1, dtype, training, _fake_empty)


def _fake_empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """``Backend.empty`` while tracing."""
    return like.new_empty(shape, dtype=dtype)


@torch.library.custom_op("pdarts_fast::derived_backward", mutates_args=())
def derived_backward(
    grad: Tensor,
    s0: Tensor,
    s1: Tensor,
    gains: list[Tensor],
    outputs: list[Tensor],
    masks: Tensor,
    key: str,
    backend: str,
    training: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both inputs, the weights and the gains (flat); empty where not in ``wants``."""
    plan, dtype = from_key(key), outputs[3].dtype
    primitives = primitives_for(backend, dtype)
    stored = _stored(plan, s0, s1, outputs, gains)
    context, found = _pass(plan, masks, dtype, training)
    shared = arrays.primitives_arrays(
        plan, found, primitives, stored, outputs[11], want_gradients=wants[2]
    )
    alphas = s1.new_ones((len(plan.sizes), 1), dtype=torch.float64)
    driver = CellBackward(primitives, context, found, stored, shared, alphas)
    driver.parameters = []
    of_nodes = arrays.node_gradients(plan, grad, stored.nodes, primitives.empty)
    with torch.autocast(s1.device.type, enabled=False):
        inputs = driver.run(of_nodes, (wants[0], wants[1]), wants[2])
    grads = [as_image(x, s) for x, s in zip(inputs, (s0, s1), strict=True)]
    nothing = gains[0].new_empty(0)
    flat, of_gains = nothing, nothing.clone()
    if wants[2]:
        flat = shared.weights.gradient().to(gains[0].dtype)
        assert driver.grad_gains is not None
        of_gains = driver.grad_gains[:-1, :, : plan.channels].to(gains[0].dtype).contiguous()
    return grads[0], grads[1], flat, of_gains


@derived_backward.register_fake
def _(grad, s0, s1, gains, outputs, masks, key, backend, training, wants):
    plan = from_key(key)
    inputs = [fake_image(s, want) for s, want in zip((s0, s1), wants[:2], strict=True)]
    where = arrays.layout(plan, plan.channels, plan.in_channels)
    total = sum(rows * columns for rows, columns in where.shapes)
    flat = gains[0].new_empty(total if wants[2] else 0)
    shape = (len(plan.norms), 2, plan.channels) if wants[2] else (0,)
    return inputs[0], inputs[1], flat, gains[0].new_empty(shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    s0, s1, weights, gains, running, masks, key, backend, training, _ = inputs
    ctx.save_for_backward(s0, s1, masks, *output, *gains)
    ctx.num_outputs, ctx.num_running = len(output), len(running)
    ctx.shapes = [weight.shape for weight in weights]
    ctx.key, ctx.backend, ctx.training = key, backend, training
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    s0, s1, masks, *rest = ctx.saved_tensors
    outputs, gains = rest[: ctx.num_outputs], rest[ctx.num_outputs :]
    nothing = [None] * ctx.num_running
    of_weights: list[Tensor | None] = [None] * len(ctx.shapes)
    of_gains: list[Tensor | None] = [None] * len(gains)
    if grad is None:
        return None, None, of_weights, of_gains, nothing, *[None] * 5
    want0, want1, want_weights, want_gains = ctx.needs_input_grad[:4]
    wants = [want0, want1, any(want_weights) or any(want_gains)]
    grad0, grad1, flat, table = torch.ops.pdarts_fast.derived_backward(
        grad, s0, s1, gains, outputs, masks, ctx.key, ctx.backend, ctx.training, wants
    )
    if wants[2]:
        parts = flat.split([shape.numel() for shape in ctx.shapes])
        of_weights = [
            part.view(shape) if want else None
            for part, shape, want in zip(parts, ctx.shapes, want_weights, strict=True)
        ]
        found = table.flatten(0, 1).unbind()
        of_gains = [one if want else None for one, want in zip(found, want_gains, strict=True)]
    return (
        grad0 if want0 else None,
        grad1 if want1 else None,
        of_weights,
        of_gains,
        nothing,
        *[None] * 5,
    )


derived_forward.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative(
    derived_backward,
    "the fused derived cell has",
    "call network.use_backend('reference') to differentiate its gradients",
)


@torch.library.custom_op("pdarts_fast::derived_update", mutates_args=("running", "batches"))
def derived_update(
    running: list[Tensor], batches: list[Tensor], stats: Tensor, key: str, counts: list[int]
) -> None:
    """``move_statistics`` of the plan ``key``."""
    move_statistics(from_key(key), running, batches, stats, counts)


@derived_update.register_fake
def _(running, batches, stats, key, counts):
    return None
