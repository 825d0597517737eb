"""The primitive calls that a cell is made of, as static tables: what each reads and writes.

A call is a list of items, one an operation of an edge or half of a separable convolution. Nothing
here depends on data or batch, so backends may cache what they derive from a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import plan as plans
from .plan import Branch, Plan


class Item(NamedTuple):
    """One operation, or one half of a separable convolution.

    Attributes:
        kind: ``plan.CONV`` ... ``plan.SKIP``.
        kernel, dilation, stride, padding: Of the depthwise convolution or the pool.
        stream: Dropout stream of a skip in training, -1 for none.
        slot: Which stored array is the output before BatchNorm; -1 for a skip.
        input: Which stored array a second half reads, else -1.
        source: State that the edge leaves.
        node: Node that the edge enters.
        half: Number of the separable convolution among those of the cell, whose first half's
            gradient ``mid_backward`` writes and ``fan_in`` reads; else -1.
        depthwise, pointwise: Indices into ``Plan.weights``, -1 for none. A FACTORIZED has two
            weights: this one and the next.
        edge, op: Place in the table of alphas.
        norm: Index of its BatchNorm in ``Plan.norms``, -1 for a skip.
        input_norm: That of the array a second half reads, else -1.
    """

    kind: int
    kernel: int
    dilation: int
    stride: int
    padding: int
    stream: int
    slot: int
    input: int
    source: int
    node: int
    half: int
    depthwise: int
    pointwise: int
    edge: int
    op: int
    norm: int
    input_norm: int = -1


class Places(NamedTuple):
    """Where the items of a call lie, int64 ``[n]`` each.

    Attributes:
        slots: Slot of every item.
        norms: Norm of every item.
        input_slots: Slot that every second half reads.
        input_norms: Norm of what every second half reads.
        alphas: Index of every item's alpha in the flattened table.
    """

    slots: Tensor
    norms: Tensor
    input_slots: Tensor
    input_norms: Tensor
    alphas: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Items of one primitive call; compared and hashed by identity."""

    items: tuple[Item, ...]
    num_ops: int

    @cached_property
    def _places(self) -> dict[torch.device, Places]:
        return {}

    def places(self, device: torch.device) -> Places:
        """Indices of the items on a device: copied there once, so that steps can be captured."""
        if device not in self._places:
            columns = (
                [item.slot for item in self.items],
                [item.norm for item in self.items],
                [item.input for item in self.items],
                [item.input_norm for item in self.items],
                [item.edge * self.num_ops + item.op for item in self.items],
            )
            self._places[device] = Places(
                *(torch.tensor(column, dtype=torch.int64, device=device) for column in columns)
            )
        return self._places[device]


@dataclass(frozen=True)
class CellCalls:
    """All calls of a cell.

    Attributes:
        inputs: Preprocessing of input 0 and 1; slot 0 is the state.
        leave: By source: first halves, dilated convolutions, pools, factorized reduces.
        second: By source: second halves.
        enter: By node: every operation with a BatchNorm.
        skips: By node: skips.
        both: By node: the two together.
        enter_second: By which inputs' gradients are wanted (0 none, 1 and 2 one, 3 both), by
            node: second halves on edges from there and from nodes.
        gather: By source: everything on the edges that leave it, skips last.
        num_halves: Separable convolutions in the cell.
    """

    inputs: tuple[Call, ...]
    leave: tuple[Call, ...]
    second: tuple[Call, ...]
    enter: tuple[Call, ...]
    skips: tuple[Call, ...]
    both: tuple[Call, ...]
    enter_second: tuple[tuple[Call, ...], ...]
    gather: tuple[Call, ...]
    num_halves: int


def _input_call(plan: Plan, which: int) -> Call:
    kind = plan.input_kind(which)
    stride = 2 if kind == plans.FACTORIZED else 1
    weight = plan.input_weights(which)[0]
    norm = len(plan.norms) - 2 + which
    item = Item(kind, 0, 1, stride, 0, -1, 0, -1, which, 0, -1, -1, weight, 0, 0, norm)
    return Call((item,), plan.num_ops)


def _first(plan: Plan, branch: Branch, half: int) -> Item:
    """What reads the source state."""
    separable = branch.first >= 0
    depthwise, pointwise = -1, -1
    if branch.kind == plans.CONV:
        depthwise, pointwise = branch.weights[:2]
    elif branch.kind == plans.FACTORIZED:
        pointwise = branch.weights[0]
    stream = -1
    if branch.kind == plans.SKIP and plan.dropout:
        stream = plan.index * plans.STREAMS_PER_CELL + branch.edge
    return Item(
        kind=branch.kind,
        kernel=branch.kernel,
        dilation=branch.dilation,
        stride=branch.stride,
        padding=branch.padding,
        stream=stream,
        slot=branch.first if separable else branch.slot,
        input=-1,
        source=branch.source,
        node=branch.node,
        half=half,
        depthwise=depthwise,
        pointwise=pointwise,
        edge=branch.edge,
        op=branch.op,
        norm=branch.norms[-1] if branch.norms else -1,
    )


def _second(plan: Plan, branch: Branch, half: int) -> Item:
    """The second half of a separable convolution."""
    depthwise, pointwise = branch.weights[2:]
    return _first(plan, branch, half)._replace(
        stride=1,
        slot=branch.slot,
        input=branch.first,
        depthwise=depthwise,
        pointwise=pointwise,
        norm=branch.norms[0],
        input_norm=branch.norms[1],
    )


def _last(plan: Plan, branch: Branch, half: int) -> Item:
    """What enters the node."""
    return _second(plan, branch, half) if half >= 0 else _first(plan, branch, half)


def _wanted(source: int, wanted: int) -> bool:
    """Whether the gradient of a state is of use, given the bits of the inputs'."""
    return source >= 2 or bool(wanted >> source & 1)


@lru_cache(maxsize=1024)
def of(key: str) -> CellCalls:
    """The calls of the plan ``key``."""
    plan = plans.from_key(key)
    separable = [branch for branch in plan.branches if branch.first >= 0]
    halves = {branch: number for number, branch in enumerate(separable)}

    def call(make: Callable[[Plan, Branch, int], Item], branches: Iterable[Branch]) -> Call:
        items = (make(plan, branch, halves.get(branch, -1)) for branch in branches)
        return Call(tuple(items), plan.num_ops)

    sources, nodes = range(plan.steps + 1), range(plan.steps)
    leaving = [plan.leaving(source) for source in sources]
    entering = [plan.entering(node) for node in nodes]

    def skips(branches: list[Branch], wanted: bool) -> list[Branch]:
        return [b for b in branches if (b.kind == plans.SKIP) == wanted]

    return CellCalls(
        inputs=tuple(_input_call(plan, which) for which in (0, 1)),
        leave=tuple(call(_first, [b for b in skips(bs, False) if not b.shared]) for bs in leaving),
        second=tuple(call(_second, [b for b in bs if b in halves]) for bs in leaving),
        enter=tuple(call(_last, skips(bs, False)) for bs in entering),
        skips=tuple(call(_first, skips(bs, True)) for bs in entering),
        both=tuple(call(_last, skips(bs, False) + skips(bs, True)) for bs in entering),
        enter_second=tuple(
            tuple(
                call(_second, [b for b in bs if b in halves and _wanted(b.source, wanted)])
                for bs in entering
            )
            for wanted in range(4)
        ),
        gather=tuple(call(_first, skips(bs, False) + skips(bs, True)) for bs in leaving),
        num_halves=len(halves),
    )
