"""What a pass of a cell would launch, without launching anything: on tensors of device ``meta``.

The gate and the time model take shapes, grids and launch counts from here, so from the launchers
themselves and the call tables of real plans, never from a copy of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import calls, cell_operator
from .. import plan as plans
from ..cell_pass import Saved, state_size
from ..interface import Arrays
from ..plan import Plan
from ..weights import Weights, layout
from .common import STORAGE, gated_storages
from .recorder import Launch, Recorder, Watched, recording
from .registry import Specialisation
from .traffic import traffic


@dataclass(frozen=True)
class Recorded:
    """A forward and a backward pass of a cell.

    Attributes:
        forward, backward: Launches of Triton kernels.
        forward_operators, backward_operators: Names of torch operators between them.
    """

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    forward_operators: tuple[str, ...]
    backward_operators: tuple[str, ...]


def _meta_pass(
    plan: Plan, backend: Any, batch: int, size: tuple[int, int], dtype: torch.dtype, wanted: bool
) -> tuple[Saved, Arrays]:
    """Arrays of a pass on device ``meta``; ``size``: of input 1."""
    channels = backend.channels(plan.channels)
    depths = [backend.channels(count) for count in plan.in_channels]
    sizes = [tuple(extent * (1 + plan.reduction_prev) for extent in size), size]

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    inputs = [meta(batch, *s, d) for s, d in zip(sizes, depths, strict=True)]
    states = [meta(batch, *state_size(plan, i, *s), channels) for i, s in enumerate(sizes)]
    out = [-(-extent // (2 if plan.reduction else 1)) for extent in size]
    saved = Saved(
        inputs=(inputs[0], inputs[1]),
        states=(states[0], states[1]),
        nodes=meta(batch, *out, plan.steps * channels),
        slots=meta(plan.num_slots, batch, *out, channels),
        norms=meta(plan.num_slots + 2, 2, channels, of=torch.float64),
    )
    where = layout(plan.key, channels, (depths[0], depths[1]))
    parameters = [meta(rows * columns, of=torch.float32) for rows, columns in where.shapes]
    arrays = Arrays(
        y=saved.slots,
        states=saved.all_states(plan.steps),
        weights=Weights(where, parameters, torch.float32, wanted),
        rate=meta(1, of=torch.float32),
        state=meta(2, of=torch.int64),
        channels=plan.channels,
        training=True,
        grads=[],
    )
    return saved, arrays


def _recorded_backend(recorder: Recorder) -> str:
    """Name of a backend whose kernels a recorder notes."""
    from .primitives import TritonPrimitives
    from .whole_cell import Steps, TritonCell

    steps: Any = Watched(Steps(), recorder)
    cell_operator.register_backend("recorded", TritonPrimitives(), TritonCell(steps))
    return "recorded"


def _meta_inputs(
    plan: Plan, batch: int, size: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Both inputs of a cell, as its predecessors leave them, and its alphas."""
    images = []
    for which, count in enumerate(plan.in_channels):
        factor = 1 + (plan.reduction_prev and which == 0)
        sides = [extent * factor for extent in size]
        rows = torch.empty(batch, *sides, count, dtype=dtype, device="meta")
        images.append(rows.permute(0, 3, 1, 2))
    return images[0], images[1], torch.empty(14, plan.num_ops, device="meta")


@lru_cache(maxsize=256)
def record_cell(
    key: str,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    want_weights: bool,
    want_inputs: bool,
) -> Recorded:
    """Both passes of the cell ``key`` in training, with all that its operators do.

    Args:
        size: Height and width of input 1.
        want_weights: A weight step; else an alpha step.
        want_inputs: Not the case in an alpha step's first cells, which only see the stem.
    """
    plan = plans.from_key(key)
    s0, s1, alphas = _meta_inputs(plan, batch, size, dtype)

    def meta(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    where = layout(key, -(-plan.channels // 16) * 16, plan.in_channels)
    weights = [meta(*shape) for shape in where.shapes]
    running = [meta(plan.channels) for _ in range(2 * len(plan.norms))]
    batches = [meta(of=torch.int64) for _ in plan.norms]
    rate, state = meta(1), meta(2, of=torch.int64)
    with recording() as forward:
        name = _recorded_backend(forward)
        outputs = cell_operator.forward_pass(
            s0, s1, alphas, weights, [], rate, state, key, name, True, dtype
        )
        counts = [outputs[0][:, 0].numel(), s1[:, 0].numel()]
        cell_operator.move_running(running, batches, outputs[8], key, counts, name)
        state.clone()  # what autograd keeps
    with recording() as backward:
        name = _recorded_backend(backward)
        wants = [want_inputs, want_inputs, True, want_weights]
        cell_operator.backward_pass(
            torch.empty_like(outputs[0]), s0, s1, alphas, weights, list(outputs), state, key, name,
            True, wants,
        )  # fmt: skip
    return Recorded(
        tuple(forward.launches), tuple(backward.launches), tuple(forward.operators),
        tuple(backward.operators),
    )  # fmt: skip


def search_cells(
    stage_channels: tuple[int, ...] = (16, 32, 64),
) -> list[tuple[str, tuple[int, int]]]:
    """Cells with every primitive on every edge at the sizes of a CIFAR-10 search: key, size.

    Of each width a normal cell, the same after a reduction, and a reduction cell; the stem's 48
    channels at the smallest.
    """
    found = []
    for level, channels in enumerate(stage_channels):
        side = 32 >> level
        for reduction, previous in ((False, False), (False, True), (True, False)):
            if (previous and level == 0) or (reduction and level == 0):
                continue
            before = 2 if reduction else 4
            depth = 48 if level == 0 else before * channels
            older = 2 * channels if previous else depth
            found.append(
                (
                    plans.make_key(
                        [[True] * 8] * 14,
                        channels=channels,
                        in_channels=(older, depth),
                        reduction=reduction,
                        reduction_prev=previous,
                        steps=4,
                        multiplier=4,
                        index=1,
                        dropout=True,
                    ),
                    (2 * side, 2 * side) if reduction else (side, side),
                )
            )
    return found


def _backward_launches(
    key: str, size: tuple[int, int], dtype: torch.dtype, wanted: bool
) -> list[Launch]:
    """Of every backward primitive of a cell, without the algebra between them."""
    from .primitives import TritonPrimitives

    plan, table = plans.from_key(key), calls.of(key)
    with recording() as recorder:
        backend: Any = Watched(TritonPrimitives(), recorder)
        saved, arrays = _meta_pass(plan, backend, 96, size, dtype, wanted)
        channels = saved.slots.shape[-1]
        arrays.grads = list(torch.empty_like(saved.nodes).chunk(plan.steps, dim=-1))
        arrays.half_grads = saved.slots.new_empty(table.num_halves, *saved.slots.shape[1:])

        def numbers(*shape: int) -> Tensor:
            return saved.norms.new_empty((*shape, channels), dtype=torch.float32)

        for node in range(plan.steps):
            count = len(table.both[node].items)
            sums = saved.norms.new_empty(1 + count, channels)
            grad = arrays.grads[node]
            backend.reduce(table.both[node], arrays, grad, numbers(count), numbers(count), sums)
            second = table.enter_second[3][node]
            count = len(second.items)
            sums = saved.norms.new_empty(count, 2, channels)
            given = (numbers(count), numbers(count), numbers(count, 3))
            backend.mid_backward(second, arrays, *given, sums)
        for source in range(plan.steps + 1):
            call, x = table.gather[source], arrays.states[source]
            for incoming in (None, x) if source > 1 else (None,):
                coef = numbers(len(call.items), 3)
                backend.fan_in(call, arrays, x, coef, incoming, torch.empty_like(x))
        for which in (0, 1):
            x, state = saved.inputs[which], saved.states[which]
            arrays.y, arrays.grads = state[None], [torch.empty_like(state)]
            sums = saved.norms.new_empty(2, channels)
            call = table.inputs[which]
            backend.reduce(call, arrays, state, numbers(1), numbers(1), sums)
            backend.fan_in(call, arrays, x, numbers(1, 3), None, torch.empty_like(x))
    return recorder.launches


@lru_cache(maxsize=1)
def _all_launches() -> tuple[Launch, ...]:
    launches: list[Launch] = []
    for key, size in search_cells():
        gated = gated_storages(plans.from_key(key).channels)
        for dtype in (dtype for dtype, name in STORAGE.items() if name in gated):
            for wanted in (True, False):
                recorded = record_cell(key, 96, size, dtype, wanted, True)
                launches += [*recorded.forward, *recorded.backward]
                launches += _backward_launches(key, size, dtype, wanted)
    return tuple(launches)


def search_specialisations(function: Any, **extra: Any) -> list[Specialisation]:
    """Every variant of a backward kernel that a CIFAR-10 search at batch 96 launches, once each.

    Args:
        extra: Attributes of ``Specialisation`` that hold for all.
    """
    found: dict[str, Specialisation] = {}
    for launch in _all_launches():
        if launch.function is function:
            one = launch.specialisation(**{"bytes": traffic(launch), **extra})
            found.setdefault(one.variant, one)
    return list(found.values())


def with_tf32(found: list[Specialisation]) -> list[Specialisation]:
    """And those of float32 at the channels where plain TF32 products are gated too."""
    plain = [
        replace(one, storage="tf32", constants=one.constants | {"PRECISION": "tf32"})
        for one in found
        if one.storage == "fp32" and "tf32" in gated_storages(one.shape[-1], product=True)
    ]
    return [*found, *plain]
