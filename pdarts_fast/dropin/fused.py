"""A recognised cell as one node of autograd, over any backend.

Its passes are single calls of the backend where that has them and the cell is made of what the
supernet's are made of (``cells.whole``); otherwise they go primitive by primitive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as unflatten

from pdarts_fast.cells import arrays, whole
from pdarts_fast.cells.context import Context, Stored
from pdarts_fast.cells.passes import CellForward
from pdarts_fast.cells.passes_backward import CellBackward
from pdarts_fast.cells.plan import CellPlan, Place
from pdarts_fast.cells.tables import Tables, tables
from pdarts_fast.dropin.modules import Modules
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.cell_operator import primitives_for
from pdarts_fast.kernels.interface import AnyCell, Arrays, Backend, Masks
from pdarts_fast.kernels.rows import as_image, as_rows, storage_dtype
from pdarts_fast.kernels.running import move_statistics


@dataclass
class _Call:
    """Everything about one call of a cell that is not a tensor to differentiate.

    Attributes:
        counts: How many weights, and scales and shifts, lead the tensors; parameters of custom
            operations follow.
        whole: Runs whole passes; None to run primitive by primitive.
        masks: Of a whole pass, until they are saved.
        places: Of the masks of a pass primitive by primitive.
    """

    context: Context
    tables: Tables
    backend: Backend
    modules: Modules
    dtype: torch.dtype
    counts: tuple[int, int]
    whole: AnyCell | None
    masks: Masks | None = None
    places: list[Place] = field(default_factory=list)

    @property
    def plan(self) -> CellPlan:
        """The cell."""
        return self.context.plan

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, scales and shifts, parameters of custom operations."""
        first, second = self.counts
        parts = list(tensors)
        return parts[:first], parts[first : first + second], parts[first + second :]

    def arrays(
        self, stored: Stored, weights: Sequence[Tensor] | Tensor, want_gradients: bool
    ) -> Arrays:
        """What the primitives work on; ``weights`` as for ``arrays.primitives_arrays``."""
        found = arrays.primitives_arrays(
            self.plan, self.tables, self.backend, stored, weights, want_gradients=want_gradients
        )
        found.training = self.whole is not None and self.context.training
        return found


def _allocate(call: _Call, s0: Tensor, s1: Tensor, gains: list[Tensor]) -> Stored:
    plan, backend, dtype = call.plan, call.backend, call.dtype
    channels = backend.channels(plan.channels)
    depths = arrays.depths(plan, backend)
    inputs = [as_rows(s0, dtype, depths[0])]
    # The first cell of a network gets one image twice.
    inputs.append(inputs[0] if s1 is s0 else as_rows(s1, dtype, depths[1]))
    batch = s1.shape[0]

    def empty(*shape: int) -> Tensor:
        return backend.empty(shape, s1, dtype)

    *of_states, of_nodes = arrays.sizes(plan, s0, s1)
    extra = 0 if call.whole is None else call.whole.extra_slots(plan)
    states = inputs
    if not plan.outside:
        states = [empty(batch, *size, channels) for size in of_states]
    norms = (
        arrays.batch_norms(plan, channels, s1.device)
        if call.context.training
        else arrays.running_norms(plan, call.modules.statistics()[0], channels)
    )
    return Stored(
        inputs,
        states,
        [torch.empty_like(s) for s in states] if plan.affine and not plan.outside else [],
        empty(batch, *of_nodes, plan.steps * channels),
        empty(plan.num_slots + extra, batch, *of_nodes, channels),
        norms,
        arrays.gains(plan, call.modules.affine, gains, channels),
    )


def _update_running(call: _Call, stored: Stored, stats: Tensor) -> None:
    counts = [stored.nodes[..., 0].numel(), stored.states[1][..., 0].numel()]
    running, batches = call.modules.statistics()
    move_statistics(call.plan, running, batches, stats, counts, call.whole)


def _forward(call: _Call, stored: Stored, shared: Arrays, alphas: Tensor) -> Tensor:
    """Fills ``stored``; returns mean and variance of the batch."""
    if call.whole is None:
        driver = CellForward(call.backend, call.context, call.tables, stored, shared, alphas)
        driver.run()
        return driver.stats
    shared.masks = call.masks = whole.draw(call.context, call.whole, call.backend, stored.slots)
    return whole.forward(call.whole, call.plan, stored, shared, alphas)


class _Cell(torch.autograd.Function):
    """Forward and backward of a recognised cell."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, s0: Tensor, s1: Tensor, alphas: Tensor, *tensors: Tensor
    ) -> Tensor:
        weights, gains, _ = call.split(tensors)
        with torch.autocast(s1.device.type, enabled=False):
            stored = _allocate(call, s0, s1, gains)
            shared = call.arrays(stored, weights, want_gradients=False)
            stats = _forward(call, stored, shared, alphas)
            if call.context.training:
                _update_running(call, stored, stats)
            out = arrays.output(call.plan, stored.nodes, call.backend.empty)
        _save(ctx, call, stored, shared.weights.made, out, (s0, s1), alphas, tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        stored, masks, alphas, flat, tensors = _restore(ctx)
        _, *wants = ctx.needs_input_grad
        rows = arrays.node_gradients(call.plan, grad, stored.nodes, call.backend.empty)
        passed = _Backward(call, stored, alphas, flat, tensors, want_weights=any(wants[3:]))
        inputs, of_alphas = passed.run(rows, masks, (wants[0], wants[1]))
        grads: list[Tensor | None] = [
            as_image(x, s) if want and x is not None else None
            for x, s, want in zip(inputs, ctx.inputs, wants, strict=False)
        ]
        grads.append(of_alphas.view(alphas.shape).to(alphas.dtype) if wants[2] else None)
        if not passed.want_weights:
            return (None, *grads, *[None] * len(tensors))
        found = zip(passed.tensor_gradients(), wants[3:], strict=True)
        return (None, *grads, *(g if want else None for g, want in found))


class _Backward:
    """The backward pass of a call.

    Args:
        call: The call.
        stored: Of the forward pass.
        alphas: As given.
        flat: All weights, packed, or empty if passes read them where they are.
        tensors: Weights, scales and shifts, parameters of custom operations.
        want_weights: Whether gradients of any of these are wanted.
    """

    def __init__(
        self,
        call: _Call,
        stored: Stored,
        alphas: Tensor,
        flat: Tensor,
        tensors: Sequence[Tensor],
        *,
        want_weights: bool,
    ) -> None:
        self.call, self.stored, self.alphas = call, stored, alphas
        self.weights, self.gains, self.parameters = call.split(tensors)
        self.want_weights = want_weights
        self.shared = call.arrays(stored, flat if flat.numel() else self.weights, want_weights)
        self.driver: CellBackward | None = None

    def run(
        self, rows: Tensor, masks: list[Tensor], want_inputs: tuple[bool, bool]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of the inputs, ``[N, H, W, C]``, and of the alphas.

        Args:
            rows: Gradient of the nodes, ``[N, H, W, steps * C]``.
            masks: As ``_save`` kept them.
            want_inputs: Whether the gradient of each input is wanted.
        """
        call, stored, shared = self.call, self.stored, self.shared
        if call.whole is not None:
            shared.masks = Masks(masks[0], masks[1]) if masks else None
            passed = (call.plan, whole.saved(stored), shared, self.alphas, rows, want_inputs)
            return call.whole.backward(*passed)
        context = replace(call.context, masks=dict(zip(call.places, masks, strict=True)))
        driver = self.driver = CellBackward(
            call.backend, context, call.tables, stored, shared, self.alphas
        )
        driver.parameters = self.parameters
        inputs = driver.run(rows, want_inputs, self.want_weights)
        return inputs, driver.grad_alphas

    def tensor_gradients(self) -> list[Tensor | None]:
        """Gradients of weights, scales and shifts, and parameters of custom operations."""
        weights, gains, driver = self.weights, self.gains, self.driver
        flat = self.shared.weights.gradient()
        grads: list[Tensor | None] = []
        if weights:
            grads += unflatten(flat.to(weights[0].dtype), weights)
        if driver is None:
            return grads
        if gains:
            assert driver.grad_gains is not None
            for rows, has in zip(driver.grad_gains[:-1], self.call.modules.affine, strict=True):
                if has:
                    grads += [row[: self.call.plan.channels].to(gains[0].dtype) for row in rows]
        return grads + driver.grad_parameters


def _save(
    ctx: Any,
    call: _Call,
    stored: Stored,
    flat: Tensor,
    out: Tensor,
    inputs: tuple[Tensor, Tensor],
    alphas: Tensor,
    tensors: Sequence[Tensor],
) -> None:
    """Keeps what the backward pass reads.

    The output stands for the nodes and inputs for their rows where they share memory: saving them
    as what they are lets autograd notice changes in place.
    """
    ctx.call = call
    # What is left of the inputs' memory is their shape and dtype.
    ctx.inputs = [s.detach().new_empty(1).expand(s.shape) for s in inputs]
    ctx.shared = [out.data_ptr() == stored.nodes.data_ptr()]
    ctx.shared += [
        rows.data_ptr() == s.data_ptr() for rows, s in zip(stored.inputs, inputs, strict=True)
    ]
    nodes = out if ctx.shared[0] else stored.nodes
    rows = [
        s if shared else x
        for s, x, shared in zip(inputs, stored.inputs, ctx.shared[1:], strict=True)
    ]
    call.places, masks = list(call.context.masks), list(call.context.masks.values())
    call.context.masks = {}
    if call.masks is not None:
        masks, call.masks = [call.masks.kept, call.masks.factors], None
    states = [] if call.plan.outside else stored.states
    gains = [] if stored.gains is None else [stored.gains]
    groups = [
        [alphas, flat, nodes, stored.slots, stored.norms],
        rows,
        states,
        stored.raw,
        gains,
        masks,
    ]
    ctx.sizes = [len(group) for group in groups]
    ctx.save_for_backward(*[tensor for group in groups for tensor in group], *tensors)


def _restore(ctx: Any) -> tuple[Stored, list[Tensor], Tensor, Tensor, list[Tensor]]:
    """``Stored``, masks, alphas, packed weights, and the tensors of the call."""
    saved = list(ctx.saved_tensors)
    groups: list[list[Tensor]] = []
    for size in ctx.sizes:
        groups.append(saved[:size])
        saved = saved[size:]
    (alphas, flat, nodes, slots, norms), rows, states, raw, gains, masks = groups
    nodes = nodes.permute(0, 2, 3, 1) if ctx.shared[0] else nodes
    inputs = [
        x.permute(0, 2, 3, 1) if shared else x
        for x, shared in zip(rows, ctx.shared[1:], strict=True)
    ]
    stored = Stored(inputs, states or inputs, raw, nodes, slots, norms, gains[0] if gains else None)
    return stored, masks, alphas, flat, saved


def run(
    plan: CellPlan,
    modules: Modules,
    backend: str,
    s0: Tensor,
    s1: Tensor,
    alphas: Tensor,
    *,
    training: bool,
    drop_path: float = 0.0,
) -> Tensor:
    """What the forward of a recognised cell returns.

    Args:
        plan: The cell.
        modules: Its modules; parameters and buffers are read, running statistics written.
        backend: A name of ``kernels.backends``.
        s0, s1: Inputs ``[N, C_prev_prev, H0, W0]`` and ``[N, C_prev, H, W]``; after
            preprocessing if ``plan.outside``.
        alphas: Weight of every operation, ``[edges, ops]``.
        training: Batch statistics and dropout, or running statistics and none.
        drop_path: Probability of dropping an operation's output for an image.

    Returns:
        ``[N, len(plan.concat) * C, H_out, W_out]``, channels-last in memory.
    """
    dtype = storage_dtype(s1)
    if backend != backends.REFERENCE:
        backends.load(backend).register()
    weights = modules.weights()
    gains, parameters = modules.gains(), modules.parameters()
    tensors: list[Any] = [*weights, *gains, *parameters]
    rates = {
        place: dropout.p
        for place, dropout in modules.dropouts.items()
        if dropout.training and dropout.p > 0
    }
    kind = s1.device.type
    context = Context(
        plan,
        s1.device,
        training,
        modules.extras,
        rates,
        drop_path if training else 0.0,
        image_dtype=s1.dtype,
        autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        record=torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (s0, s1, alphas, *tensors)),
    )
    call = _Call(
        context,
        tables(plan, frozenset(rates), context.drop_path > 0),
        primitives_for(backend, dtype),
        modules,
        dtype,
        (len(weights), len(gains)),
        whole.find(context, backend, dtype),
    )
    return _Cell.apply(call, s0, s1, alphas, *tensors)
