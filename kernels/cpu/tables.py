"""What compiled passes read beside arrays: the calls of a cell as C structs, sizes, addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .. import calls as cell_calls
from .. import plan as plans
from ..calls import Call, Item
from ..plan import Plan
from . import abi

_POOLS = (plans.MAX_POOL, plans.AVG_POOL)
_FLOAT = {torch.float32}
# Arrays begin at whole cache lines, counted in the shortest numbers that are stored.
_LINE = 32

Shape = Sequence[int]


@lru_cache(maxsize=1024)
def places(plan: str | Plan) -> tuple[int, ...]:
    """Which stored array every slot is; -1 of a pool, which is cheaper to compute than to keep.

    It is computed anew by whoever reads it, from a state that is read anyway.
    """
    plan = plans.from_key(plan) if isinstance(plan, str) else plan
    pools = {branch.slot for branch in plan.branches if branch.kind in _POOLS}
    kept = (slot for slot in range(plan.num_slots) if slot not in pools)
    by_slot = {slot: place for place, slot in enumerate(kept)}
    return tuple(by_slot.get(slot, -1) for slot in range(plan.num_slots))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels may read or write tensors where they are; without a loop in Python."""
    return {x.dtype for x in tensors} <= _FLOAT and all(map(Tensor.is_contiguous, tensors))


def addresses_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """Where tensors begin, int64."""
    return np.array(list(map(Tensor.data_ptr, tensors)), dtype=np.int64)


def places_in_room(counts: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of so many elements begin in an array that has room for all, and its length."""
    begins = list(accumulate((-(-count // _LINE) * _LINE for count in counts), initial=0))
    return begins[:-1], begins[-1]


def drops(plan: Plan) -> dict[int, int]:
    """Number of the skip of every edge whose dropout is a stream; all have stride 1."""
    edges = [b.edge for b in plan.branches if b.kind == plans.SKIP and plan.stream(b) >= 0]
    return {edge: number for number, edge in enumerate(edges)}


class Tables:
    """A plan's calls as C structs; holds the memory that they point to.

    Attributes:
        struct: What ``abi.CellTask.calls`` points to.
    """

    def __init__(self, plan: Plan, offsets: list[int]) -> None:
        calls = cell_calls.of_plan(plan)
        self._offsets = [*offsets, -1]
        self._places = [*places(plan.key or plan), -1]
        self._drops = drops(plan)
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
        table["kept"] = [
            self._drops.get(item.edge, -1) if item.kind == plans.SKIP else -1 for item in call.items
        ]
        table["alpha"] = [item.edge * call.num_ops + item.op for item in call.items]
        return table


@lru_cache(maxsize=1024)
def tables(plan: str | Plan, offsets: tuple[int, ...]) -> Tables:
    """Tables of a plan, or of that of a key: hashing a plan with a key takes long."""
    return Tables(plans.from_key(plan) if isinstance(plan, str) else plan, list(offsets))


@lru_cache(maxsize=1024)
def unbiased(plan: str | Plan, pixels: int, input_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Slot of every norm, and what makes its variance of that many values unbiased."""
    plan = plans.from_key(plan) if isinstance(plan, str) else plan
    slots = np.array(plan.norm_slots, dtype=np.int64)
    counts = np.where(slots < plan.num_slots, pixels, input_pixels)
    return slots, counts / np.maximum(counts - 1, 1)


def set_sizes(
    task: abi.CellTask,
    nodes: Shape,
    inputs: Sequence[Shape],
    states: Sequence[Shape],
    real_channels: int,
    dtype: torch.dtype,
) -> None:
    """Writes sizes into a task.

    Args:
        nodes: Images, height, width and channels of a node.
        inputs: The same of both inputs.
        states: The same of both states.
        real_channels: Channels of a node without padding.
        dtype: Of the arrays.
    """
    task.images, task.height, task.width, task.channels = nodes
    task.real_channels, task.bf16 = real_channels, dtype == torch.bfloat16
    for which in (0, 1):
        _, task.in_height[which], task.in_width[which], task.in_channels[which] = inputs[which]
        task.in_parts[which] = 1
        _, task.state_height[which], task.state_width[which], _ = states[which]
