"""Whole passes of a cell in one call of the compiled library.

The order of the primitives and the algebra between them are those of ``cell_forward`` and
``cell_backward``; ``csrc/cell_forward.cpp`` and ``csrc/cell_backward.cpp`` repeat them because
Python between the primitives took a third of the time of the last stage.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import calls as cell_calls
from .. import moments
from ..cell_pass import Saved
from ..interface import Arrays
from ..plan import Plan
from ..weights import Layout, Weights
from . import abi
from . import draw as drawing
from .library import Library
from .memory import pool
from .tables import addresses_of, are_plain, places, places_in_room, set_sizes, tables, unbiased


def _are_read_in_place(where: Layout, parameters: Sequence[Tensor]) -> bool:
    return where.is_plain and are_plain(parameters)


class CompiledCell:
    """``interface.AnyCell`` over the compiled library."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _task(self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor) -> abi.CellTask:
        """What both passes need; ``alphas`` is float64 and contiguous."""
        weights = self._addresses(arrays.weights)
        described = tables(plan.key or plan, tuple(arrays.weights.layout.offsets))
        slots = saved.slots
        task = abi.CellTask(calls=ctypes.addressof(described.struct))
        inputs, states = [x.shape for x in saved.inputs], [x.shape for x in saved.states]
        set_sizes(task, slots.shape[1:], inputs, states, arrays.channels, slots.dtype)
        task.training, task.threads = arrays.training, torch.get_num_threads()
        for which in (0, 1):
            task.inputs[which] = saved.inputs[which].data_ptr()
            task.states[which] = saved.states[which].data_ptr()
        task.nodes, task.y = saved.nodes.data_ptr(), slots.data_ptr()
        task.norms, task.alphas = saved.norms.data_ptr(), alphas.data_ptr()
        task.weights, task.alive = weights.ctypes.data, weights
        task.dropout_rate = arrays.rate.data_ptr()
        task.dropout_state = arrays.state.data_ptr()
        if arrays.masks is not None:
            task.masks = arrays.masks.kept.data_ptr()
            task.mask_factors = arrays.masks.factors.data_ptr()
        return task

    def _addresses(self, weights: Weights) -> np.ndarray:
        """Where every weight begins."""
        given, where = weights.parameters, weights.layout
        if not isinstance(given, Tensor) and _are_read_in_place(where, given):
            return addresses_of(given)
        flat = weights.flat
        offsets = np.array(where.offsets, dtype=np.int64)
        return flat.data_ptr() + flat.element_size() * offsets

    def kept_weights(self, where: Layout, parameters: Sequence[Tensor], dtype: torch.dtype) -> int:
        return 0 if _are_read_in_place(where, parameters) else where.total

    def extra_slots(self, plan: Plan) -> int:
        return -places(plan.key or plan).count(-1)

    def forward(
        self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor, stats: Tensor
    ) -> None:
        alphas = alphas.detach().double().contiguous()
        task = self._task(plan, saved, arrays, alphas)
        task.stats = stats.data_ptr()
        self.library.run_cells(ctypes.addressof(task), 1, backward=False)

    def backward(
        self,
        plan: Plan,
        saved: Saved,
        arrays: Arrays,
        alphas: Tensor,
        grad: Tensor,
        want_inputs: tuple[bool, bool],
    ) -> tuple[list[Tensor | None], Tensor]:
        weights = arrays.weights.grad
        alphas = alphas.detach().double().contiguous()
        grad_alphas = torch.empty_like(alphas)
        task = self._task(plan, saved, arrays, alphas)
        task.grad, task.grad_alphas = grad.data_ptr(), grad_alphas.data_ptr()
        if weights is not None:
            task.grad_weights = weights.data_ptr()
        inputs: list[Tensor | None] = [None, None]
        for which, want in enumerate(want_inputs):
            if want:
                like = saved.inputs[which]
                found = inputs[which] = pool.empty(tuple(like.shape), like.dtype)
                task.grad_inputs[which] = found.data_ptr()
        wants = [want or weights is not None for want in want_inputs]
        room = self._backward_room(plan, saved, task, wants)
        self.library.run_cells(ctypes.addressof(task), 1, backward=True)
        del room
        return inputs, grad_alphas.flatten()

    @staticmethod
    def _backward_room(
        plan: Plan, saved: Saved, task: abi.CellTask, wants: Sequence[bool]
    ) -> Tensor:
        """Where a backward pass keeps gradients of nodes, halves and wanted states, one array."""
        slots = saved.slots
        of_slot = math.prod(slots.shape[1:])
        halves = cell_calls.of_plan(plan).num_halves
        counts = [(plan.steps - 1) * of_slot, halves * of_slot]
        counts += [x.numel() if want else 0 for x, want in zip(saved.states, wants, strict=True)]
        begins, length = places_in_room(counts)
        room = pool.empty((length,), slots.dtype)
        base, size = room.data_ptr(), slots.element_size()
        task.node_grads, task.half_grads = base, base + begins[1] * size
        for which, want in enumerate(wants):
            if want:
                task.state_grads[which] = base + begins[2 + which] * size
        return room

    def draw(self, kept: Tensor, channels: int, probabilities: Sequence[float]) -> bool:
        if not drawing.agrees(self.library):
            return False
        drawing.draw(self.library, kept, channels, probabilities, torch.default_generator)
        return True

    def move_running(
        self,
        plan: Plan,
        running: list[Tensor],
        batches: list[Tensor],
        stats: Tensor,
        counts: list[int],
    ) -> bool:
        if not are_plain(running):
            return False
        stats = stats.contiguous()
        slots, factors = unbiased(plan.key or plan, counts[0], counts[1])
        addresses, counters = addresses_of(running), addresses_of(batches)
        task = abi.RunningTask(
            norms=len(batches),
            channels=plan.channels,
            padded=stats.shape[-1],
            slots=slots.ctypes.data,
            running=addresses.ctypes.data,
            batches=counters.ctypes.data,
            stats=stats.data_ptr(),
            unbiased=factors.ctypes.data,
            momentum=moments.MOMENTUM,
        )
        self.library.move_running(ctypes.addressof(task), 1)
        # Autograd notices that a graph has an older value.
        torch.autograd.graph.increment_version([*running, *batches])
        return True
