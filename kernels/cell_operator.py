"""A search cell as operators of torch: forward, backward, fake implementations, autograd.

What happens inside ``pdarts_fast::cell_forward`` is invisible to tracing, so ``torch.compile`` and
``torch.export`` see a cell as a single node. Running statistics are updated by an operator of
their own, since only functional operators may have gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors as unflatten

from . import moments
from . import plan as plans
from .cell_backward import Backward
from .cell_forward import Forward
from .cell_pass import Saved, state_size
from .interface import AnyCell, Arrays, Backend, WholeCell
from .plan import Plan
from .reference import Reference
from .rows import as_image, as_rows, copy_shape, fake_image, refuse_second_derivative
from .running import move_statistics, running_moments
from .weights import Weights, layout

_BACKENDS: dict[str, Backend] = {"reference": Reference()}
_WHOLE_CELLS: dict[str, WholeCell] = {}


def register_backend(name: str, backend: Backend, whole_cell: WholeCell | None = None) -> None:
    """Makes primitives available under a name that ``run`` accepts.

    Args:
        name: Of the backend.
        backend: Its primitives.
        whole_cell: Runs whole passes; without it ``Forward`` and ``Backward`` call the primitives.
    """
    _BACKENDS[name] = backend
    _WHOLE_CELLS.pop(name, None)
    if whole_cell is not None:
        _WHOLE_CELLS[name] = whole_cell


@contextmanager
def primitive_by_primitive(name: str) -> Iterator[None]:
    """Inside the block a backend's cells call its primitives one by one, to be measured."""
    whole = _WHOLE_CELLS.pop(name, None)
    try:
        yield
    finally:
        if whole is not None:
            _WHOLE_CELLS[name] = whole


def backend_named(name: str) -> Backend:
    """The primitives that ``register_backend`` was given under a name.

    Raises:
        KeyError: There are none.
    """
    return _BACKENDS[name]


def _served_by(name: str, dtype: torch.dtype) -> str:
    """float64 goes through the reference primitives: kernels have float32 and bfloat16."""
    return "reference" if dtype == torch.float64 else name


def primitives_for(name: str, dtype: torch.dtype) -> Backend:
    """The primitives of a backend for arrays of a dtype."""
    return _BACKENDS[_served_by(name, dtype)]


def whole_cell(name: str, dtype: torch.dtype) -> WholeCell | None:
    """What runs whole passes of a backend for arrays of a dtype, if anything does."""
    return _WHOLE_CELLS.get(_served_by(name, dtype))


def any_cell(name: str, dtype: torch.dtype) -> AnyCell | None:
    """What runs whole passes of any plan for arrays of a dtype, if anything does."""
    found = whole_cell(name, dtype)
    return found if isinstance(found, AnyCell) else None


def _output_size(plan: Plan, s1: Tensor) -> tuple[int, int, int]:
    divisor = 2 if plan.reduction else 1
    return s1.shape[0], -(-s1.shape[2] // divisor), -(-s1.shape[3] // divisor)


def _whole_output(plan: Plan, channels: int) -> bool:
    """Whether the array of the nodes is the output as it stands."""
    return plan.multiplier == plan.steps and channels == plan.channels


Empty = Callable[[tuple[int, ...], Tensor, torch.dtype], Tensor]
Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


def _fake_empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """``Backend.empty`` while tracing."""
    return like.new_empty(shape, dtype=dtype)


def _empty_outputs(
    plan: Plan,
    backend: Backend,
    s0: Tensor,
    s1: Tensor,
    dtype: torch.dtype,
    training: bool,
    empty: Empty,
    whole: WholeCell | None,
) -> list[Tensor]:
    """Arrays for all results of ``cell_forward`` but the last, uninitialised, from ``empty``."""
    batch, height, width = _output_size(plan, s1)
    channels = backend.channels(plan.channels)
    depths = [backend.channels(count) for count in plan.in_channels]
    copies = [
        empty(copy_shape(s, dtype, depth), s1, dtype)
        for s, depth in zip((s0, s1), depths, strict=True)
    ]
    states = [
        empty((batch, *state_size(plan, which, *s.shape[2:]), channels), s1, dtype)
        for which, s in enumerate((s0, s1))
    ]
    nodes = empty((batch, height, width, plan.steps * channels), s1, dtype)
    num_slots = plan.num_slots + (0 if whole is None else whole.extra_slots(plan))
    slots = empty((num_slots, batch, height, width, channels), s1, dtype)
    rows = plan.num_slots + 2 if training else len(plan.norms)
    norms = s1.new_empty((rows, 2, channels), dtype=torch.float64)
    if _whole_output(plan, channels):
        out, nodes = nodes.permute(0, 3, 1, 2), nodes.new_empty(0)
    else:
        shape = (batch, height, width, plan.multiplier * plan.channels)
        out = empty(shape, s1, dtype).permute(0, 3, 1, 2)
    rate = s1.new_empty(1, dtype=torch.float32)
    stats = torch.empty_like(norms)
    return [out, *copies, *states, nodes, slots, norms, stats, rate]


def _saved(s0: Tensor, s1: Tensor, outputs: Sequence[Tensor]) -> Saved:
    """The arrays of the backward pass, where outputs hold no copy from what they alias."""
    out, copy0, copy1, state0, state1, nodes, slots, norms, *_ = outputs
    inputs = [
        copy if copy.numel() else s.detach().permute(0, 2, 3, 1)
        for s, copy in zip((s0, s1), (copy0, copy1), strict=True)
    ]
    if not nodes.numel():
        nodes = out.detach().permute(0, 2, 3, 1)
    return Saved((inputs[0], inputs[1]), (state0, state1), nodes, slots, norms)


def _arrays(
    plan: Plan,
    primitives: Backend,
    saved: Saved,
    weights: Sequence[Tensor] | Tensor,
    dropout: tuple[Tensor, Tensor],
    training: bool,
    want_gradients: bool,
    whole: WholeCell | None,
) -> Arrays:
    """What the primitives work on; ``weights`` as of ``Weights``, ``dropout`` is rate and state."""
    depths = (saved.inputs[0].shape[-1], saved.inputs[1].shape[-1])
    where = layout(plan.key, saved.slots.shape[-1], depths)
    dtype = primitives.coefficient_dtype(saved.slots.dtype)
    length = 0
    if whole is not None and not isinstance(weights, Tensor):
        length = whole.kept_weights(where, weights, saved.slots.dtype)
    return Arrays(
        y=saved.slots,
        states=saved.all_states(plan.steps),
        weights=Weights(where, weights, dtype, want_gradients, length),
        rate=dropout[0],
        state=dropout[1],
        channels=plan.channels,
        training=training,
        grads=[],
    )


def _write_output(plan: Plan, nodes: Tensor, out: Tensor) -> None:
    """Copies the last nodes, without padding, into the output ``[N, C, H, W]``."""
    by_node = nodes.unflatten(-1, (plan.steps, -1))
    kept = by_node[..., plan.steps - plan.multiplier :, : plan.channels]
    out.permute(0, 2, 3, 1).copy_(kept.flatten(-2))


def forward_pass(
    s0: Tensor,
    s1: Tensor,
    alphas: Tensor,
    weights: list[Tensor],
    running: list[Tensor],
    rate: Tensor,
    state: Tensor,
    key: str,
    backend: str,
    training: bool,
    dtype: torch.dtype,
) -> Outputs:
    """A cell of the plan ``key``: output, what backward reads (``_saved``), flat weights."""
    plan, primitives = plans.from_key(key), primitives_for(backend, dtype)
    whole = whole_cell(backend, dtype)
    outputs = _empty_outputs(plan, primitives, s0, s1, dtype, training, primitives.empty, whole)
    channels = primitives.channels(plan.channels)
    for s, copy, count in zip((s0, s1), outputs[1:3], plan.in_channels, strict=True):
        if copy.numel():
            copy.copy_(as_rows(s, dtype, primitives.channels(count)))
    saved = _saved(s0, s1, outputs)
    if not training:
        saved.norms.copy_(moments.normalisation(running_moments(plan, running, channels)))
    outputs[9].copy_(rate)
    arrays = _arrays(plan, primitives, saved, weights, (rate, state), training, False, whole)
    if whole is not None:
        whole.forward(plan, saved, arrays, alphas, outputs[8])
    else:
        Forward(primitives, plan, saved, arrays, alphas).run(outputs[8])
    if not _whole_output(plan, channels):
        _write_output(plan, saved.nodes, outputs[0])
    return (*outputs, arrays.weights.made)  # type: ignore[return-value]


cell_forward = torch.library.custom_op("pdarts_fast::cell_forward", forward_pass, mutates_args=())


@cell_forward.register_fake
def _(s0, s1, alphas, weights, running, rate, state, key, backend, training, dtype):
    plan, primitives = plans.from_key(key), primitives_for(backend, dtype)
    whole = whole_cell(backend, dtype)
    outputs = _empty_outputs(plan, primitives, s0, s1, dtype, training, _fake_empty, whole)
    depth0, depth1 = map(primitives.channels, plan.in_channels)
    where = layout(key, outputs[6].shape[-1], (depth0, depth1))
    total = where.total if whole is None else whole.kept_weights(where, weights, dtype)
    return (*outputs, s1.new_empty(total, dtype=primitives.coefficient_dtype(dtype)))


def backward_pass(
    grad: Tensor,
    s0: Tensor,
    s1: Tensor,
    alphas: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    state: Tensor,
    key: str,
    backend: str,
    training: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both inputs, the alphas and the weights (flat); empty where not in ``wants``."""
    plan, dtype = plans.from_key(key), outputs[3].dtype
    primitives = primitives_for(backend, dtype)
    saved = _saved(s0, s1, outputs)
    dropout = (outputs[9], state)
    packed = outputs[10] if outputs[10].numel() else weights
    whole = whole_cell(backend, dtype)
    arrays = _arrays(plan, primitives, saved, packed, dropout, training, wants[3], whole)
    node_grads, want_inputs = _node_gradients(plan, grad, saved), (wants[0], wants[1])
    if whole is not None:
        grads, all_alphas = whole.backward(plan, saved, arrays, alphas, node_grads, want_inputs)
    else:
        backward = Backward(primitives, plan, saved, arrays, alphas)
        grads = backward.run(node_grads, want_inputs, wants[3])
        all_alphas = backward.grad_alphas
    grad_inputs = [as_image(rows, s) for rows, s in zip(grads, (s0, s1), strict=True)]
    grad_alphas = all_alphas.view(alphas.shape) if wants[2] else alphas.new_empty(0)
    flat = arrays.weights.gradient() if wants[3] else weights[0].new_empty(0)
    return grad_inputs[0], grad_inputs[1], grad_alphas.to(alphas.dtype), flat.to(weights[0].dtype)


def _node_gradients(plan: Plan, grad: Tensor, saved: Saved) -> Tensor:
    """Gradient of the output as one of all nodes, ``[N, H, W, steps * C]``."""
    channels = saved.slots.shape[-1]
    rows = grad.to(saved.slots.dtype).permute(0, 2, 3, 1)
    if _whole_output(plan, channels):
        return rows.contiguous()
    full = rows.new_zeros(*rows.shape[:3], plan.steps, channels)
    by_node = rows.unflatten(-1, (plan.multiplier, plan.channels))
    full[..., plan.steps - plan.multiplier :, : plan.channels] = by_node
    return full.flatten(-2)


def _fake_gradients(
    s0: Tensor, s1: Tensor, alphas: Tensor, weights: list[Tensor], wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = sum(weight.numel() for weight in weights)
    inputs = [fake_image(s, want) for s, want in zip((s0, s1), wants[:2], strict=True)]
    grad_alphas = alphas.new_empty(alphas.shape if wants[2] else 0)
    flat = weights[0].new_empty(total if wants[3] else 0)
    return inputs[0], inputs[1], grad_alphas, flat


cell_backward = torch.library.custom_op(
    "pdarts_fast::cell_backward", backward_pass, mutates_args=()
)


@cell_backward.register_fake
def _(grad, s0, s1, alphas, weights, outputs, state, key, backend, training, wants):
    return _fake_gradients(s0, s1, alphas, weights, wants)


def keep(ctx, inputs, outputs) -> None:
    """Saves for the backward pass what ``cell_forward`` was given and gave back."""
    s0, s1, alphas, weights, _, _, state, key, backend, training, _ = inputs
    ctx.save_for_backward(s0, s1, alphas, state.clone(), *outputs, *weights)
    ctx.num_outputs = len(outputs)
    ctx.key, ctx.backend, ctx.training = key, backend, training
    ctx.set_materialize_grads(False)


def gradients(ctx, run, grad, wants_before, want_weights):
    """Gradients of both inputs, the alphas and every weight, None where not wanted.

    Args:
        ctx: As ``keep`` left it.
        run: ``backward_pass`` or the operator of it.
        grad: Of the output, or None.
        wants_before: Whether each of the first three is wanted.
        want_weights: Whether that of each weight is wanted.
    """
    s0, s1, alphas, state, *rest = ctx.saved_tensors
    outputs, weights = rest[: ctx.num_outputs], rest[ctx.num_outputs :]
    grads: list[Tensor | None] = [None] * len(weights)
    if grad is None:
        return [None] * 3, grads
    wants = [*wants_before, any(want_weights)]
    *before, flat = run(
        grad, s0, s1, alphas, weights, outputs, state, ctx.key, ctx.backend, ctx.training, wants
    )
    if wants[3]:
        parts = unflatten(flat, weights)
        grads = [part if want else None for part, want in zip(parts, want_weights, strict=True)]
    return [g if want else None for g, want in zip(before, wants_before, strict=True)], grads


def _setup_context(ctx, inputs, output) -> None:
    keep(ctx, inputs, output)
    ctx.num_running = len(inputs[4])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    *wants_before, want_weights = ctx.needs_input_grad[:4]
    run = torch.ops.pdarts_fast.cell_backward
    before, grads = gradients(ctx, run, grad, wants_before, want_weights)
    return (*before, grads, [None] * ctx.num_running, *[None] * 6)


cell_forward.register_autograd(_backward, setup_context=_setup_context)
NO_SECOND_DERIVATIVE = (
    "the fused search cell has",
    "build the network with backend='reference' to differentiate its gradients",
)
refuse_second_derivative(cell_backward, *NO_SECOND_DERIVATIVE)


def move_running(
    running: list[Tensor],
    batches: list[Tensor],
    stats: Tensor,
    key: str,
    counts: list[int],
    backend: str = "reference",
) -> None:
    """Moves running means and variances (alternately, by norm) towards those of the batch.

    Args:
        running: ``[C]`` each.
        batches: Counters, int64 scalars.
        stats: float64 ``[slots + 2, 2, C]`` of ``cell_forward``.
        key: The plan.
        counts: M of the cell's slots, and of its preprocessed inputs.
        backend: Whose kernels may do it.
    """
    whole = whole_cell(backend, running[0].dtype)
    move_statistics(plans.from_key(key), running, batches, stats, counts, whole)


# For traces; eagerly the function itself is twice as fast.
update_running = torch.library.custom_op(
    "pdarts_fast::update_running", move_running, mutates_args=("running", "batches")
)


@update_running.register_fake
def _(running, batches, stats, key, counts, backend="reference"):
    return None
