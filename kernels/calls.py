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
        mask: Number of a skip's mask where masks are drawn outside (``interface.Masks``), else -1.
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
    mask: int = -1


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


class Builder:
    """Makes the items of a plan's calls.

    Args:
        plan: The cell.

    Attributes:
        halves: Number of every separable convolution, by edge and position.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        separable = [branch for branch in plan.branches if branch.first >= 0]
        self.halves = {(b.edge, b.op): number for number, b in enumerate(separable)}

    def input(self, which: int) -> Item:
        """Preprocessing of an input; slot 0 is the state."""
        plan = self.plan
        kind, weight = plan.input_kind(which), plan.input_weights(which)[0]
        stride = 2 if kind == plans.FACTORIZED else 1
        norm = len(plan.norms) - 2 + which
        return Item(kind, 0, 1, stride, 0, -1, 0, -1, which, 0, -1, -1, weight, 0, 0, norm)

    def first(self, branch: Branch) -> Item:
        """What reads the source state."""
        depthwise, pointwise = -1, -1
        if branch.kind == plans.CONV:
            depthwise, pointwise = branch.weights[:2]
        elif branch.kind == plans.FACTORIZED:
            pointwise = branch.weights[0]
        return Item(
            kind=branch.kind,
            kernel=branch.kernel,
            dilation=branch.dilation,
            stride=branch.stride,
            padding=branch.padding,
            stream=self.plan.stream(branch),
            slot=branch.first if branch.first >= 0 else branch.slot,
            input=-1,
            source=branch.source,
            node=branch.node,
            half=self.halves.get((branch.edge, branch.op), -1),
            depthwise=depthwise,
            pointwise=pointwise,
            edge=branch.edge,
            op=branch.op,
            norm=branch.norms[-1] if branch.norms else -1,
            mask=self.plan.mask(branch),
        )

    def second(self, branch: Branch) -> Item:
        """The second half of a separable convolution."""
        return self.first(branch)._replace(
            stride=1,
            slot=branch.slot,
            input=branch.first,
            depthwise=branch.weights[2],
            pointwise=branch.weights[3],
            norm=branch.norms[0],
            input_norm=branch.norms[1],
        )

    def last(self, branch: Branch) -> Item:
        """What enters the node."""
        return self.second(branch) if branch.first >= 0 else self.first(branch)


def _wanted(source: int, wanted: int) -> bool:
    """Whether the gradient of a state is of use, given the bits of the inputs'."""
    return source >= 2 or bool(wanted >> source & 1)


@lru_cache(maxsize=1024)
def of(key: str) -> CellCalls:
    """The calls of the plan ``key``."""
    return _build(plans.from_key(key))


@lru_cache(maxsize=1024)
def _build(plan: Plan) -> CellCalls:
    build = Builder(plan)

    def call(make: Callable[[Branch], Item], branches: Iterable[Branch]) -> Call:
        return Call(tuple(map(make, branches)), plan.num_ops)

    sources, nodes = range(plan.steps + 1), range(plan.steps)
    leaving = [plan.leaving(source) for source in sources]
    entering = [plan.entering(node) for node in nodes]

    def skips(branches: list[Branch], wanted: bool) -> list[Branch]:
        return [b for b in branches if (b.kind == plans.SKIP) == wanted]

    def separable(branches: list[Branch], wanted: int = 3) -> list[Branch]:
        return [b for b in branches if b.first >= 0 and _wanted(b.source, wanted)]

    return CellCalls(
        inputs=tuple(Call((build.input(which),), plan.num_ops) for which in (0, 1)),
        leave=tuple(
            call(build.first, [b for b in skips(bs, False) if not b.shared]) for bs in leaving
        ),
        second=tuple(call(build.second, separable(bs)) for bs in leaving),
        enter=tuple(call(build.last, skips(bs, False)) for bs in entering),
        skips=tuple(call(build.first, skips(bs, True)) for bs in entering),
        both=tuple(call(build.last, skips(bs, False) + skips(bs, True)) for bs in entering),
        enter_second=tuple(
            tuple(call(build.second, separable(bs, wanted)) for bs in entering)
            for wanted in range(4)
        ),
        gather=tuple(call(build.first, skips(bs, False) + skips(bs, True)) for bs in leaving),
        num_halves=len(build.halves),
    )


def of_plan(plan: Plan) -> CellCalls:
    """The calls of any plan, with a key or without."""
    return of(plan.key) if plan.key else _build(plan)
