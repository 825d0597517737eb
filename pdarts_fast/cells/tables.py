"""The primitive calls of a cell: ``kernels.calls`` for a ``CellPlan``.

Operations behind an active dropout or drop-path have arrays of their own: a dropout a masked copy
of the state, and both in the backward pass one of the node's gradient. The calls refer to these by
numbers behind those of the usual states and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pdarts_fast.cells.plan import CellPlan, Place, place_of
from pdarts_fast.kernels import calls
from pdarts_fast.kernels import plan as plans
from pdarts_fast.kernels.calls import Call, Item
from pdarts_fast.kernels.plan import Branch
from pdarts_fast.kernels.weights import Layout


class Group:
    """A call, and where its items' numbers lie in the tables of a pass.

    Args:
        plan: The cell.
        items: Of the call.

    Attributes:
        call: For the primitives.
        bare: Whether an item is a pool without BatchNorm.
        inputs: For every item a call of its own over what it reads, as if that entered a node.
    """

    def __init__(self, plan: CellPlan, items: Iterable[Item]) -> None:
        self.call = Call(tuple(items), plan.num_ops)
        self.bare = [(item.edge, item.op) in plan.bare for item in self.call.items]
        last_train, last = plan.num_slots + 2, len(plan.norms)
        items = self.call.items
        self._numbers = {
            "slots": [item.slot for item in items],
            "alphas": [item.edge * plan.num_ops + item.op for item in items],
            "train": self._or(last_train, [item.slot for item in items]),
            "eval": self._or(last, [item.norm for item in items]),
            "half_train": [item.input for item in items],
            "half_eval": [item.input_norm for item in items],
            "bare": [number for number, bare in enumerate(self.bare) if bare],
        }
        self.inputs = [Call((i._replace(slot=i.input),), plan.num_ops) for i in self.call.items]
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    def _or(self, instead: int, numbers: list[int]) -> list[int]:
        """Rows, with that of "no BatchNorm" for bare pools and skips."""
        return [
            instead if bare or number < 0 else number
            for bare, number in zip(self.bare, numbers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.call.items)

    def index(self, name: str, device: torch.device) -> Tensor:
        """int64 ``[n]``: ``slots``, ``alphas``, or rows of a table of norms.

        Args:
            name: ``train`` and ``eval`` are rows of ``Saved.norms``, ``half_train`` and
                ``half_eval`` those of what second halves read; ``bare`` numbers items.
            device: Where the index is needed.
        """
        key = (name, device)
        if key not in self._indices:
            numbers = torch.tensor(self._numbers[name], dtype=torch.int64, device=device)
            self._indices[key] = numbers
        return self._indices[key]


@dataclass(frozen=True)
class Masked:
    """An operation behind a mask: its place, number of its gradient, and its last call."""

    place: Place
    grad: int
    last: Group


@dataclass(frozen=True)
class Tables:
    """All calls of a cell.

    Attributes:
        inputs: Preprocessing of input 0 and 1; empty if that happens outside.
        leave, second: By source: all that reads a state, and second halves.
        normed, skips: By node: what enters it, with and without BatchNorm.
        mix: By node: the two together, over masked copies of states; skips alone with a
            drop-path.
        shared: By node: what enters it and sees the node's own gradient.
        masked: By node: what sees a gradient of its own.
        enter_second: As in ``CellCalls``.
        gather: By source: everything on the edges that leave it, skips last.
        num_halves: Separable convolutions in the cell.
        states: Number of the masked copy of a state, by place of a skip.
    """

    inputs: tuple[Group, ...]
    leave: tuple[Group, ...]
    second: tuple[Group, ...]
    normed: tuple[Group, ...]
    skips: tuple[Group, ...]
    mix: tuple[Group, ...]
    shared: tuple[Group, ...]
    masked: tuple[tuple[Masked, ...], ...]
    enter_second: tuple[tuple[Group, ...], ...]
    gather: tuple[Group, ...]
    num_halves: int
    states: dict[Place, int]


class _Builder(calls.Builder):
    def __init__(self, plan: CellPlan, masked: Sequence[Branch]) -> None:
        super().__init__(plan)
        self.grads = {place_of(b): plan.steps + i for i, b in enumerate(masked)}
        skips = [place_of(b) for b in masked if b.kind == plans.SKIP]
        self.states = {place: plan.steps + 2 + i for i, place in enumerate(skips)}

    def first(self, branch: Branch) -> Item:
        """What reads the source state, with the number of its gradient."""
        node = self.grads.get(place_of(branch), branch.node)
        return super().first(branch)._replace(node=node)

    def copied(self, branch: Branch) -> Item:
        """``last`` over the masked copy, if there is one."""
        item, place = self.last(branch), place_of(branch)
        return item._replace(source=self.states.get(place, item.source))


@lru_cache(maxsize=1024)
def tables(plan: CellPlan, masked_skips: frozenset[Place], drop_path: bool) -> Tables:
    """The calls of a cell.

    Args:
        plan: The cell.
        masked_skips: Skips with an active dropout.
        drop_path: Whether everything but identities is behind a drop-path.
    """
    masked = [
        b
        for b in plan.branches
        if (place_of(b) in masked_skips if b.kind == plans.SKIP else drop_path)
    ]
    build = _Builder(plan, masked)
    leaving = [plan.leaving(source) for source in range(plan.steps + 1)]
    entering = [_skips_last(plan.entering(node)) for node in range(plan.steps)]
    grads = build.grads

    def group(items: Iterable[Item]) -> Group:
        return Group(plan, items)

    def seconds(branches: list[Branch], wanted: int) -> Group:
        kept = (b for b in branches if b.source >= 2 or wanted >> b.source & 1)
        return group(build.second(b) for b in kept if b.first >= 0)

    return Tables(
        inputs=() if plan.outside else tuple(group([build.input(which)]) for which in (0, 1)),
        leave=tuple(
            group(build.first(b) for b in bs if b.kind != plans.SKIP and not b.shared)
            for bs in leaving
        ),
        second=tuple(group(build.second(b) for b in bs if b.first >= 0) for bs in leaving),
        normed=tuple(group(build.last(b) for b in bs if b.kind != plans.SKIP) for bs in entering),
        skips=tuple(group(build.last(b) for b in bs if b.kind == plans.SKIP) for bs in entering),
        mix=tuple(
            group(build.copied(b) for b in bs if not drop_path or b.kind == plans.SKIP)
            for bs in entering
        ),
        shared=tuple(
            group(build.last(b) for b in bs if place_of(b) not in grads) for bs in entering
        ),
        masked=tuple(
            tuple(
                Masked(place_of(b), grads[place_of(b)], group([build.last(b)]))
                for b in bs
                if place_of(b) in grads
            )
            for bs in entering
        ),
        enter_second=tuple(tuple(seconds(bs, w) for bs in entering) for w in range(4)),
        gather=tuple(group(map(build.first, _skips_last(bs))) for bs in leaving),
        num_halves=len(build.halves),
        states=build.states,
    )


def _skips_last(branches: list[Branch]) -> list[Branch]:
    return sorted(branches, key=lambda branch: branch.kind == plans.SKIP)


@lru_cache(maxsize=1024)
def layout(plan: CellPlan, channels: int, in_channels: tuple[int, int]) -> Layout:
    """Where every weight of a plan lies."""
    return Layout(plan, channels, in_channels)
