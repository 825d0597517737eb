"""Whole passes of a cell in one call of the compiled library.

The order of the primitives and the algebra between them are those of ``cell_forward`` and
``cell_backward``; ``csrc/cell_forward.cpp`` and ``csrc/cell_backward.cpp`` repeat them because
Python between the primitives took a third of the time of the last stage.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .. import calls as cell_calls
from .. import moments
from .. import plan as plans
from ..calls import Call, Item
from ..cell_pass import Saved
from ..interface import Arrays
from ..plan import Plan
from ..weights import Layout, Weights
from . import abi
from . import draw as drawing
from .library import Library
from .memory import pool

_POOLS = (plans.MAX_POOL, plans.AVG_POOL)
_FLOAT = {torch.float32}
# Arrays begin at whole cache lines, counted in the shortest numbers that are stored.
_LINE = 32


@lru_cache(maxsize=1024)
def _places(plan: str | Plan) -> tuple[int, ...]:
    """Which stored array every slot is; -1 of a pool, which is cheaper to compute than to keep.

    It is computed anew by whoever reads it, from a state that is read anyway.
    """
    plan = plans.from_key(plan) if isinstance(plan, str) else plan
    pools = {branch.slot for branch in plan.branches if branch.kind in _POOLS}
    kept = (slot for slot in range(plan.num_slots) if slot not in pools)
    by_slot = {slot: place for place, slot in enumerate(kept)}
    return tuple(by_slot.get(slot, -1) for slot in range(plan.num_slots))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may read or write tensors where they are; without a loop in Python."""
    return {x.dtype for x in tensors} <= _FLOAT and all(map(Tensor.is_contiguous, tensors))


def _are_read_in_place(where: Layout, parameters: Sequence[Tensor]) -> bool:
    return where.is_plain and _are_plain(parameters)


def _addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)


class Tables:
    """A plan's calls as C structs; holds the memory that they point to.

    Attributes:
        struct: What ``abi.CellTask.calls`` points to.
    """

    def __init__(self, plan: Plan, offsets: list[int]) -> None:
        calls = cell_calls.of_plan(plan)
        self._offsets = [*offsets, -1]
        self._places = [*_places(plan.key or plan), -1]
        self._kept: list[object] = []
        self.struct = abi.CellCalls(
            steps=plan.steps,
            slots=plan.num_slots,
            halves=calls.num_halves,
            alphas=plan.num_edges * plan.num_ops,
            norms=len(plan.norms),
            inputs=self._calls(calls.inputs),
            leave=self._calls(calls.leave),
            second=self._calls(calls.second),
            enter=self._calls(calls.both),
            enter_second=self._calls([call for row in calls.enter_second for call in row]),
            gather=self._calls(calls.gather),
        )

    def _calls(self, calls: Sequence[Call]) -> int:
        """Address of an array of ``struct Call``."""
        array = (abi.Call * len(calls))()
        for struct, call in zip(array, calls, strict=True):
            items = self._items(call)
            normed = sum(item.kind != plans.SKIP for item in call.items)
            struct.count, struct.normed = len(call.items), normed
            struct.items = items.ctypes.data
            self._kept.append(items)
        self._kept.append(array)
        return ctypes.addressof(array)

    def _items(self, call: Call) -> np.ndarray:
        table = np.zeros(len(call.items), dtype=abi.ITEM)
        for name in abi.ITEM.names or ():
            if name in Item._fields and name not in ("depthwise", "pointwise"):
                table[name] = [getattr(item, name) for item in call.items]
        table["depthwise"] = [self._offsets[item.depthwise] for item in call.items]
        table["pointwise"] = [self._offsets[item.pointwise] for item in call.items]
        table["depthwise_weight"] = [item.depthwise for item in call.items]
        table["pointwise_weight"] = [item.pointwise for item in call.items]
        table["place"] = [self._places[item.slot] for item in call.items]
        table["input_place"] = [self._places[item.input] for item in call.items]
        table["alpha"] = [item.edge * call.num_ops + item.op for item in call.items]
        return table


@lru_cache(maxsize=1024)
def _tables(plan: str | Plan, offsets: tuple[int, ...]) -> Tables:
    """Tables of a plan, or of that of a key: hashing a plan with a key takes long."""
    return Tables(plans.from_key(plan) if isinstance(plan, str) else plan, list(offsets))


@lru_cache(maxsize=1024)
def _unbiased(plan: str | Plan, pixels: int, input_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Slot of every norm, and what makes its variance of that many values unbiased."""
    plan = plans.from_key(plan) if isinstance(plan, str) else plan
    slots = np.array(plan.norm_slots, dtype=np.int64)
    counts = np.where(slots < plan.num_slots, pixels, input_pixels)
    return slots, counts / np.maximum(counts - 1, 1)


class CompiledCell:
    """``interface.AnyCell`` over the compiled library."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _task(self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor) -> abi.CellTask:
        """What both passes need; ``alphas`` is float64 and contiguous."""
        weights = self._addresses(arrays.weights)
        tables = _tables(plan.key or plan, tuple(arrays.weights.layout.offsets))
        slots = saved.slots
        task = abi.CellTask(calls=ctypes.addressof(tables.struct))
        _, task.images, task.height, task.width, task.channels = slots.shape
        task.real_channels, task.training = arrays.channels, arrays.training
        task.bf16, task.threads = slots.dtype == torch.bfloat16, torch.get_num_threads()
        for which in (0, 1):
            _, height, width, channels = saved.inputs[which].shape
            task.in_height[which], task.in_width[which] = height, width
            task.in_channels[which] = channels
            _, task.state_height[which], task.state_width[which], _ = saved.states[which].shape
            task.inputs[which] = saved.inputs[which].data_ptr()
            task.states[which] = saved.states[which].data_ptr()
        task.nodes, task.y = saved.nodes.data_ptr(), slots.data_ptr()
        task.norms, task.alphas = saved.norms.data_ptr(), alphas.data_ptr()
        task.weights, task.kept = weights.ctypes.data, weights
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
            return _addresses_of(given)
        flat = weights.flat
        offsets = np.array(where.offsets, dtype=np.int64)
        return flat.data_ptr() + flat.element_size() * offsets

    def kept_weights(self, where: Layout, parameters: Sequence[Tensor], dtype: torch.dtype) -> int:
        return 0 if _are_read_in_place(where, parameters) else where.total

    def extra_slots(self, plan: Plan) -> int:
        return -_places(plan.key or plan).count(-1)

    def forward(
        self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor, stats: Tensor
    ) -> None:
        alphas = alphas.detach().double().contiguous()
        task = self._task(plan, saved, arrays, alphas)
        task.stats = stats.data_ptr()
        self.library.run_cell(task, backward=False)

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
        self.library.run_cell(task, backward=True)
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
        begins = list(accumulate((-(-count // _LINE) * _LINE for count in counts), initial=0))
        room = pool.empty((begins[-1],), slots.dtype)
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
        if not _are_plain(running):
            return False
        stats = stats.contiguous()
        slots, unbiased = _unbiased(plan.key or plan, counts[0], counts[1])
        addresses, counters = _addresses_of(running), _addresses_of(batches)
        task = abi.RunningTask(
            norms=len(batches),
            channels=plan.channels,
            padded=stats.shape[-1],
            slots=slots.ctypes.data,
            running=addresses.ctypes.data,
            batches=counters.ctypes.data,
            stats=stats.data_ptr(),
            unbiased=unbiased.ctypes.data,
            momentum=moments.MOMENTUM,
        )
        self.library.move_running(task)
        # Autograd notices that a graph has an older value.
        torch.autograd.graph.increment_version([*running, *batches])
        return True
