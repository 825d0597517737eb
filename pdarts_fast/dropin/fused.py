"""A recognised cell as one node of autograd, over the primitives of any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdarts_fast.cells.context import Context, Stored
from pdarts_fast.cells.passes import CellForward
from pdarts_fast.cells.passes_backward import CellBackward
from pdarts_fast.cells.plan import CellPlan, Place
from pdarts_fast.cells.tables import Tables, layout, tables
from pdarts_fast.dropin.modules import Modules
from pdarts_fast.kernels import backends, moments
from pdarts_fast.kernels.cell import backend_named
from pdarts_fast.kernels.cell_pass import state_size
from pdarts_fast.kernels.interface import Arrays, Backend
from pdarts_fast.kernels.weights import Weights

Empty = Callable[[tuple[int, ...], Tensor, torch.dtype], Tensor]


@dataclass
class _Call:
    """Everything about one call of a cell that is not a tensor to differentiate.

    Attributes:
        counts: How many weights, and scales and shifts, lead the tensors; parameters of custom
            operations follow.
    """

    context: Context
    tables: Tables
    backend: Backend
    modules: Modules
    dtype: torch.dtype
    counts: tuple[int, int]

    @property
    def plan(self) -> CellPlan:
        """The cell."""
        return self.context.plan

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights, scales and shifts, parameters of custom operations."""
        first, second = self.counts
        parts = list(tensors)
        return parts[:first], parts[first : first + second], parts[first + second :]

    def arrays(self, stored: Stored, weights: Sequence[Tensor], want_gradients: bool) -> Arrays:
        """What the primitives work on."""
        depths = (stored.inputs[0].shape[-1], stored.inputs[1].shape[-1])
        where = layout(self.plan, stored.slots.shape[-1], depths)
        dtype = self.backend.coefficient_dtype(stored.slots.dtype)
        states = [*stored.states, *stored.nodes.chunk(self.plan.steps, dim=-1)]
        # Masked copies take their places during the forward pass.
        states += [states[0]] * len(self.tables.states)
        return Arrays(
            y=stored.slots,
            states=states,
            weights=Weights(where, weights, dtype, want_gradients),
            rate=stored.norms.new_zeros(1, dtype=torch.float32),
            state=stored.norms.new_zeros(2, dtype=torch.int64),
            channels=self.plan.channels,
            training=False,
            grads=[],
        )

    def gains(self, tensors: list[Tensor], channels: int) -> Tensor | None:
        """``Stored.gains``."""
        if not self.plan.affine:
            return None
        device = self.context.device
        shape = (len(self.plan.norms) + 1, 2, channels)
        gains = torch.zeros(shape, dtype=torch.float64, device=device)
        gains[:, 0] = 1
        rest = iter(tensors)
        for i, norm in enumerate(self.modules.norms):
            if norm.weight is not None:
                for row in gains[i]:
                    row[: self.plan.channels] = next(rest).detach()
        return gains


def _rows(x: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, channels]``; no copy if it already is."""
    rows = x.detach().to(dtype).permute(0, 2, 3, 1)
    missing = channels - x.shape[1]
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def _norms(call: _Call, channels: int) -> Tensor:
    """``Stored.norms``, filled in evaluation."""
    plan, training = call.plan, call.context.training
    rows = plan.num_slots + 2 if training else len(plan.norms)
    norms = torch.zeros((rows + 1, 2, channels), dtype=torch.float64, device=call.context.device)
    if not training:
        for i, norm in enumerate(call.modules.norms):
            norms[i, 0, : plan.channels] = norm.running_mean
            norms[i, 1, : plan.channels] = norm.running_var
        norms.copy_(moments.normalisation(norms))
    norms[-1, 0], norms[-1, 1] = 1, 0
    return norms


def _allocate(call: _Call, s0: Tensor, s1: Tensor, gains: list[Tensor]) -> Stored:
    plan, backend, dtype = call.plan, call.backend, call.dtype
    channels = backend.channels(plan.channels)
    depths = [channels if plan.outside else backend.channels(c) for c in plan.in_channels]
    inputs = [_rows(s, dtype, depth) for s, depth in zip((s0, s1), depths, strict=True)]
    batch = s1.shape[0]

    def empty(*shape: int) -> Tensor:
        return backend.empty(shape, s1, dtype)

    states = inputs
    if not plan.outside:
        sizes = [state_size(plan, which, *x.shape[1:3]) for which, x in enumerate(inputs)]
        states = [empty(batch, *size, channels) for size in sizes]
    divisor = 2 if plan.reduction else 1
    height, width = (-(-side // divisor) for side in states[1].shape[1:3])
    slots = plan.num_slots + len(call.tables.slots)
    return Stored(
        inputs,
        states,
        [torch.empty_like(s) for s in states] if plan.affine and not plan.outside else [],
        empty(batch, height, width, plan.steps * channels),
        empty(slots, batch, height, width, channels),
        _norms(call, channels),
        call.gains(gains, channels),
    )


def _output(plan: CellPlan, nodes: Tensor, empty: Empty) -> Tensor:
    """The nodes of the output, ``[N, concat * C, H, W]``; shares memory where it can."""
    by_node = nodes.unflatten(-1, (plan.steps, -1))
    if plan.all_nodes and by_node.shape[-1] == plan.channels:
        return nodes.permute(0, 3, 1, 2)
    out = empty((*nodes.shape[:3], len(plan.concat) * plan.channels), nodes, nodes.dtype)
    parts = out.unflatten(-1, (-1, plan.channels))
    if plan.all_nodes:
        parts.copy_(by_node[..., : plan.channels])
    else:
        for place, node in enumerate(plan.concat):
            parts[..., place, :].copy_(by_node[..., node, : plan.channels])
    return out.permute(0, 3, 1, 2)


def _node_gradients(plan: CellPlan, grad: Tensor, nodes: Tensor, empty: Empty) -> Tensor:
    """Gradient of the output as one of all nodes, ``[N, H, W, steps * C]``."""
    rows = grad.to(nodes.dtype).permute(0, 2, 3, 1)
    channels = nodes.shape[-1] // plan.steps
    if plan.all_nodes and channels == plan.channels:
        return rows.contiguous()
    full = empty(tuple(nodes.shape), nodes, nodes.dtype)
    by_node, parts = full.unflatten(-1, (-1, channels)), rows.unflatten(-1, (-1, plan.channels))
    by_node[..., plan.channels :].zero_()
    for node in set(range(plan.steps)) - set(plan.concat):
        by_node[..., node, :].zero_()
    if plan.all_nodes:
        by_node[..., : plan.channels].copy_(parts)
    else:
        for place, node in enumerate(plan.concat):
            by_node[..., node, : plan.channels].copy_(parts[..., place, :])
    return full


def _update_running(call: _Call, stored: Stored, stats: Tensor) -> None:
    """Moves running statistics towards those of the batch, as BatchNorm does in training."""
    plan, norms = call.plan, call.modules.norms
    inner, outer = stored.nodes[..., 0].numel(), stored.states[1][..., 0].numel()
    picked = stats[list(plan.norm_slots), :, : plan.channels]
    for i, slot in enumerate(plan.norm_slots):
        count = inner if slot < plan.num_slots else outer
        picked[i, 1] = moments.unbiased(picked[i, 1], count)
    running = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
    targets = picked.to(running[0].dtype).flatten(0, 1).unbind()
    torch._foreach_lerp_(running, list(targets), moments.MOMENTUM)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


class _Cell(torch.autograd.Function):
    """Forward and backward of a recognised cell."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, s0: Tensor, s1: Tensor, alphas: Tensor, *tensors: Tensor
    ) -> Tensor:
        weights, gains, _ = call.split(tensors)
        with torch.autocast(s1.device.type, enabled=False):
            stored = _allocate(call, s0, s1, gains)
            arrays = call.arrays(stored, weights, want_gradients=False)
            driver = CellForward(call.backend, call.context, call.tables, stored, arrays, alphas)
            driver.run()
            if call.context.training:
                _update_running(call, stored, driver.stats)
            out = _output(call.plan, stored.nodes, call.backend.empty)
        _save(ctx, call, stored, out, (s0, s1), alphas, tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        call: _Call = ctx.call
        stored, masks, alphas, tensors = _restore(ctx)
        weights, gains, parameters = call.split(tensors)
        _, want0, want1, want_alphas, *wants = ctx.needs_input_grad
        want_weights = any(wants)
        context = replace(call.context, masks=masks)
        arrays = call.arrays(stored, weights, want_weights)
        driver = CellBackward(call.backend, context, call.tables, stored, arrays, alphas)
        driver.parameters = parameters
        rows = _node_gradients(call.plan, grad, stored.nodes, call.backend.empty)
        inputs = driver.run(rows, (want0, want1), want_weights)
        grads: list[Tensor | None] = [
            x[..., :channels].permute(0, 3, 1, 2).to(dtype) if want and x is not None else None
            for x, (channels, dtype), want in zip(inputs, ctx.inputs, (want0, want1), strict=True)
        ]
        of_alphas = driver.grad_alphas.view(alphas.shape).to(alphas.dtype)
        grads.append(of_alphas if want_alphas else None)
        if want_weights:
            found = _tensor_gradients(call, driver, arrays.weights, weights, gains)
            grads += [g if want else None for g, want in zip(found, wants, strict=True)]
        else:
            grads += [None] * len(tensors)
        return (None, *grads)


def _save(
    ctx: Any,
    call: _Call,
    stored: Stored,
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
    ctx.inputs = [(s.shape[1], s.dtype) for s in inputs]
    ctx.shared = [out.data_ptr() == stored.nodes.data_ptr()]
    ctx.shared += [
        rows.data_ptr() == s.data_ptr() for rows, s in zip(stored.inputs, inputs, strict=True)
    ]
    nodes = out if ctx.shared[0] else stored.nodes
    rows = [
        s if shared else x
        for s, x, shared in zip(inputs, stored.inputs, ctx.shared[1:], strict=True)
    ]
    ctx.places = list(call.context.masks)
    masks = list(call.context.masks.values())
    call.context.masks = {}
    states = [] if call.plan.outside else stored.states
    gains = [] if stored.gains is None else [stored.gains]
    groups = [[alphas, nodes, stored.slots, stored.norms], rows, states, stored.raw, gains, masks]
    ctx.sizes = [len(group) for group in groups]
    ctx.save_for_backward(*[tensor for group in groups for tensor in group], *tensors)


def _restore(ctx: Any) -> tuple[Stored, dict[Place, Tensor], Tensor, list[Tensor]]:
    """``Stored``, masks, weights of the operations, and the tensors of the call."""
    saved = list(ctx.saved_tensors)
    groups: list[list[Tensor]] = []
    for size in ctx.sizes:
        groups.append(saved[:size])
        saved = saved[size:]
    (alphas, nodes, slots, norms), rows, states, raw, gains, masks = groups
    nodes = nodes.permute(0, 2, 3, 1) if ctx.shared[0] else nodes
    inputs = [
        x.permute(0, 2, 3, 1) if shared else x
        for x, shared in zip(rows, ctx.shared[1:], strict=True)
    ]
    stored = Stored(inputs, states or inputs, raw, nodes, slots, norms, gains[0] if gains else None)
    return stored, dict(zip(ctx.places, masks, strict=True)), alphas, saved


def _tensor_gradients(
    call: _Call,
    driver: CellBackward,
    packed: Weights,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of weights, scales and shifts, and parameters of custom operations."""
    parts = packed.gradient().split([weight.numel() for weight in weights])
    grads: list[Tensor | None] = [
        part.view(weight.shape).to(weight.dtype)
        for part, weight in zip(parts, weights, strict=True)
    ]
    if gains:
        assert driver.grad_gains is not None
        for rows, norm in zip(driver.grad_gains[:-1], call.modules.norms, strict=True):
            if norm.weight is not None:
                grads += [row[: call.plan.channels].to(gains[0].dtype) for row in rows]
    return grads + driver.grad_parameters


def _storage_dtype(x: Tensor) -> torch.dtype:
    """dtype of the arrays: that of autocast in its region; float16 is computed in float32."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def primitives(name: str, dtype: torch.dtype) -> Backend:
    """The primitives of a backend; float64 goes through those of the reference."""
    if dtype == torch.float64:
        name = backends.REFERENCE
    if name != backends.REFERENCE:
        backends.load(name).register()
    return backend_named(name)


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
    dtype = _storage_dtype(s1)
    weights = [module.weight for module in modules.convolutions]
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
        primitives(backend, dtype),
        modules,
        dtype,
        (len(weights), len(gains)),
    )
    return _Cell.apply(call, s0, s1, alphas, *tensors)
