"""Arrays of a cell's passes: from images to padded rows and back, statistics, scales and shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pdarts_fast.cells.context import Stored
from pdarts_fast.cells.plan import CellPlan
from pdarts_fast.cells.tables import Tables, layout
from pdarts_fast.kernels import moments
from pdarts_fast.kernels.cell_pass import state_size
from pdarts_fast.kernels.interface import Arrays, Backend
from pdarts_fast.kernels.weights import Weights

Empty = Callable[[tuple[int, ...], Tensor, torch.dtype], Tensor]
"""Makes an uninitialised array: shape, a tensor on its device, dtype."""


def depths(plan: CellPlan, backend: Backend) -> list[int]:
    """Channels of both inputs after padding."""
    if plan.outside:
        return [backend.channels(plan.channels)] * 2
    return [backend.channels(count) for count in plan.in_channels]


def sizes(plan: CellPlan, s0: Tensor, s1: Tensor) -> list[tuple[int, int]]:
    """Height and width of both states after preprocessing, and of the nodes.

    Args:
        s0, s1: Both cell inputs, ``[N, C, H, W]``.
    """
    found = [tuple(s.shape[2:]) for s in (s0, s1)]
    if not plan.outside:
        found = [state_size(plan, which, *size) for which, size in enumerate(found)]
    divisor = 2 if plan.reduction else 1
    height, width = found[1]
    return [*found, (-(-height // divisor), -(-width // divisor))]  # type: ignore[list-item]


def running_norms(plan: CellPlan, running: Sequence[Tensor], channels: int) -> Tensor:
    """``Stored.norms`` of evaluation.

    Args:
        running: Running mean and variance of every norm of the plan, ``[C]`` each.
        channels: C with padding.
    """
    table = running[0].new_zeros(len(plan.norms) + 1, 2, channels, dtype=torch.float64)
    table[:-1, :, : plan.channels] = torch.stack(list(running)).view(-1, 2, plan.channels)
    table.copy_(moments.normalisation(table))
    return _with_identity(table)


def batch_norms(plan: CellPlan, channels: int, device: torch.device) -> Tensor:
    """``Stored.norms`` of training, to be filled by the forward pass."""
    shape = (plan.num_slots + 3, 2, channels)
    return _with_identity(torch.zeros(shape, dtype=torch.float64, device=device))


def _with_identity(table: Tensor) -> Tensor:
    table[-1, 0], table[-1, 1] = 1, 0
    return table


def gains(
    plan: CellPlan, affine: Sequence[bool], tensors: Sequence[Tensor], channels: int
) -> Tensor | None:
    """``Stored.gains``, or None if no BatchNorm has a scale and a shift.

    Args:
        affine: Which norms of the plan have them.
        tensors: Scale and shift of those, ``[C]`` each.
        channels: C with padding.
    """
    if not tensors:
        return None
    table = tensors[0].new_zeros(len(affine) + 1, 2, channels, dtype=torch.float64)
    table[:, 0] = 1
    given = torch.stack([tensor.detach() for tensor in tensors]).view(-1, 2, plan.channels)
    if all(affine):
        table[:-1, :, : plan.channels] = given
    else:
        places = [number for number, has in enumerate(affine) if has]
        table[places, :, : plan.channels] = given.double()
    return table


def primitives_arrays(
    plan: CellPlan,
    tables: Tables,
    backend: Backend,
    stored: Stored,
    weights: Sequence[Tensor] | Tensor,
    *,
    want_gradients: bool,
) -> Arrays:
    """What the primitives work on.

    Args:
        weights: Parameters in the order of the plan, or ``Weights.flat`` of an earlier pass.
        want_gradients: Whether to make room for gradients of the weights.
    """
    where = layout(
        plan,
        stored.slots.shape[-1],
        (stored.inputs[0].shape[-1], stored.inputs[1].shape[-1]),
    )
    dtype = backend.coefficient_dtype(stored.slots.dtype)
    states = [*stored.states, *stored.nodes.chunk(plan.steps, dim=-1)]
    # Masked copies take their places during the forward pass.
    states += [states[0]] * len(tables.states)
    return Arrays(
        y=stored.slots,
        states=states,
        weights=Weights(where, weights, dtype, want_gradients),
        rate=stored.norms.new_zeros(1, dtype=torch.float32),
        state=stored.norms.new_zeros(2, dtype=torch.int64),
        channels=plan.channels,
        training=False,
        grads=[],
    )


def whole_output(plan: CellPlan, channels: int) -> bool:
    """Whether the array of the nodes is the output as it stands."""
    return plan.all_nodes and channels == plan.channels


def output(plan: CellPlan, nodes: Tensor, empty: Empty) -> Tensor:
    """The nodes of the output, ``[N, concat * C, H, W]``; shares memory where it can."""
    by_node = nodes.unflatten(-1, (plan.steps, -1))
    if whole_output(plan, by_node.shape[-1]):
        return nodes.permute(0, 3, 1, 2)
    out = empty((*nodes.shape[:3], len(plan.concat) * plan.channels), nodes, nodes.dtype)
    out = out.permute(0, 3, 1, 2)
    write_output(plan, nodes, out)
    return out


def write_output(plan: CellPlan, nodes: Tensor, out: Tensor) -> None:
    """Copies the nodes of the output, without padding, to ``[N, concat * C, H, W]``."""
    parts = out.permute(0, 2, 3, 1).unflatten(-1, (-1, plan.channels))
    for target, source in _parts(plan, parts, nodes.unflatten(-1, (plan.steps, -1))):
        target.copy_(source)


def _parts(plan: CellPlan, parts: Tensor, by_node: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of a piece of the output ``[N, H, W, concat, C]`` and the nodes it is made of."""
    by_node = by_node[..., : plan.channels]
    if plan.all_nodes:
        return [(parts, by_node)]
    return [(parts[..., place, :], by_node[..., node, :]) for place, node in enumerate(plan.concat)]


def node_gradients(plan: CellPlan, grad: Tensor, nodes: Tensor, empty: Empty) -> Tensor:
    """Gradient of the output as one of all nodes, ``[N, H, W, steps * C]``."""
    found = grad.to(nodes.dtype).permute(0, 2, 3, 1)
    channels = nodes.shape[-1] // plan.steps
    if whole_output(plan, channels):
        return found.contiguous()
    full = empty(tuple(nodes.shape), nodes, nodes.dtype)
    by_node = full.unflatten(-1, (-1, channels))
    by_node[..., plan.channels :].zero_()
    for node in set(range(plan.steps)) - set(plan.concat):
        by_node[..., node, :].zero_()
    for source, target in _parts(plan, found.unflatten(-1, (-1, plan.channels)), by_node):
        target.copy_(source)
    return full
