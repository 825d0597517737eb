"""A plan for any cell: ``kernels.plan`` with fewer assumptions.

Edges may have different numbers of operations in any order, operations that only their own module
can compute (*extras*), pools without BatchNorm, BatchNorms with scale and shift, inputs that are
preprocessed outside, and any choice of nodes in the output. Parameters are found by path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from pdarts_fast.kernels import plan as plans
from pdarts_fast.kernels.plan import Branch, Plan

NOTHING = "nothing"
CUSTOM = "custom"

Place = tuple[int, int]
"""Edge, and position among its operations."""


@dataclass(frozen=True)
class StockOp:
    """What an operation computes.

    Attributes:
        kind: A kind of ``kernels.plan``, ``NOTHING`` (zeros) or
            ``CUSTOM`` (computed by its own module).
        stride: 1 or 2; 0 if it cannot be told (custom).
        kernel, dilation: Of the depthwise convolutions.
        channels: Input and output channels, None where any number will do.
        convolutions: Paths of the convolutions, relative to the operation, in order of use.
        norms: Paths of the BatchNorms in order of use; empty for a bare pool.
        dropout: Path of the dropout behind a skip.
    """

    kind: int | str
    stride: int = 0
    kernel: int = 0
    dilation: int = 1
    channels: tuple[int, int] | None = None
    convolutions: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    dropout: str | None = None


@dataclass(frozen=True)
class Edge:
    """Operations from one state into one node.

    Attributes:
        node, source: Where; sources 0 and 1 are the inputs, source ``2 + i`` is node ``i``.
        ops: What each operation is, in the order of the weights.
        paths: Path of each operation's module, relative to the cell.
    """

    node: int
    source: int
    ops: tuple[StockOp, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Extra:
    """An operation that its own module computes: where it stands, and the module's path."""

    edge: int
    op: int
    node: int
    source: int
    path: str


def place_of(operation: Branch | Extra) -> Place:
    """Key of an operation."""
    return operation.edge, operation.op


@dataclass(frozen=True, eq=False)
class CellPlan(Plan):
    """Plan of a cell; compared and hashed by identity.

    Attributes:
        outside: Whether both inputs arrive preprocessed: by their own modules.
        concat: Nodes (0, 1, ...) that the output concatenates, in order.
        extras: Custom operations, by edge and position.
        dropouts: Path of the dropout behind a skip, by (edge, position).
        affine: Whether some BatchNorm has scale and shift.
        bare: (edge, position) of pools without BatchNorm.
        sizes: Number of operations of every edge.
    """

    outside: bool = False
    concat: tuple[int, ...] = ()
    extras: tuple[Extra, ...] = ()
    dropouts: tuple[tuple[Place, str], ...] = ()
    affine: bool = False
    bare: frozenset[Place] = frozenset()
    sizes: tuple[int, ...] = ()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def input_weights(self, which: int) -> tuple[int, ...]:
        return () if self.outside else super().input_weights(which)

    @property
    def num_edges(self) -> int:
        return len(self.sizes)

    @cached_property
    def masks(self) -> dict[Place, int]:
        """Number of every skip with a dropout, in the order in which the cell draws their masks."""
        behind = {place for place, _ in self.dropouts}
        found = [(b.node, place_of(b)) for b in self.branches if place_of(b) in behind]
        return {place: number for number, (_, place) in enumerate(sorted(found))}

    def mask(self, branch: Branch) -> int:
        return self.masks.get(place_of(branch), -1)

    @property
    def all_nodes(self) -> bool:
        """Whether the output is all nodes in their order."""
        return self.concat == tuple(range(self.steps))


@dataclass
class _Parts:
    branches: list[Branch] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    norm_slots: list[int] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    dropouts: list[tuple[Place, str]] = field(default_factory=list)
    bare: set[Place] = field(default_factory=set)
    pools: dict[tuple[int, int], int] = field(default_factory=dict)
    num_slots: int = 0

    def weight(self, *path: str) -> int:
        self.weights.append(join(*path, "weight"))
        return len(self.weights) - 1

    def norm(self, slot: int, *path: str) -> int:
        self.norms.append(join(*path))
        self.norm_slots.append(slot)
        return len(self.norms) - 1

    def slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1


def join(*path: str) -> str:
    """A module path of its parts, of which some may be empty."""
    return ".".join(part for part in path if part)


def _add(parts: _Parts, op: StockOp, place: Branch, path: str) -> None:
    """Adds one operation; ``place`` says where it stands."""
    if op.kind == NOTHING:
        return
    if op.kind == CUSTOM:
        extra = Extra(place.edge, place.op, place.node, place.source, path)
        parts.extras.append(extra)
        return
    branch = replace(place, kind=op.kind, stride=op.stride)
    if op.kind == plans.SKIP:
        if op.dropout is not None:
            parts.dropouts.append(((place.edge, place.op), join(path, op.dropout)))
        parts.branches.append(branch)
        return
    if op.kind in (plans.MAX_POOL, plans.AVG_POOL):
        key = (branch.kind, branch.source)
        shared = key in parts.pools
        slot = parts.pools[key] if shared else parts.slot()
        parts.pools[key] = slot
        norms = tuple(parts.norm(slot, path, norm) for norm in op.norms)
        if not norms:
            parts.bare.add((place.edge, place.op))
        parts.branches.append(replace(branch, slot=slot, norms=norms, shared=shared))
        return
    # First half's slot first, as its output is stored first.
    slots = [parts.slot() for _ in op.norms]
    parts.branches.append(
        replace(
            branch,
            kernel=op.kernel,
            dilation=op.dilation,
            padding=op.dilation * (op.kernel - 1) // 2,
            slot=slots[-1],
            first=slots[0] if len(slots) == 2 else -1,
            weights=tuple(parts.weight(path, name) for name in op.convolutions),
            norms=tuple(
                parts.norm(slot, path, name)
                for slot, name in reversed(list(zip(slots, op.norms, strict=True)))
            ),
        )
    )


def build(
    edges: Sequence[Edge],
    inputs: tuple[StockOp, StockOp] | None,
    input_paths: tuple[str, str],
    *,
    channels: int,
    in_channels: tuple[int, int],
    reduction: bool,
    steps: int,
    concat: tuple[int, ...],
) -> CellPlan:
    """The plan of a cell.

    Args:
        edges: In the order of the weights' rows.
        inputs: How the inputs are preprocessed; None if that happens outside.
        input_paths: Paths of the preprocessing modules.
        channels: C of every node.
        in_channels: Of both inputs (C if they are preprocessed outside).
        reduction: Whether edges from the inputs have stride 2.
        steps: Number of nodes.
        concat: Nodes that the output concatenates.

    Returns:
        The plan, with ``affine`` unset.
    """
    parts = _Parts()
    for op, path in zip(inputs or (), input_paths, strict=False):
        for name in op.convolutions:
            parts.weight(path, name)
    for number, edge in enumerate(edges):
        for position, (op, path) in enumerate(zip(edge.ops, edge.paths, strict=True)):
            place = Branch(plans.SKIP, number, edge.node, edge.source, position, 1)
            _add(parts, op, place, path)
    for which, (op, path) in enumerate(zip(inputs or (), input_paths, strict=False)):
        parts.norm(parts.num_slots + which, path, op.norms[0])
    return CellPlan(
        key="",
        channels=channels,
        in_channels=in_channels,
        reduction=reduction,
        reduction_prev=inputs is not None and inputs[0].kind == plans.FACTORIZED,
        steps=steps,
        multiplier=len(concat),
        index=0,
        dropout=False,
        num_ops=max(len(edge.ops) for edge in edges),
        branches=tuple(parts.branches),
        num_slots=parts.num_slots,
        weights=tuple(parts.weights),
        norms=tuple(parts.norms),
        norm_slots=tuple(parts.norm_slots),
        outside=inputs is None,
        concat=concat,
        extras=tuple(parts.extras),
        dropouts=tuple(parts.dropouts),
        bare=frozenset(parts.bare),
        sizes=tuple(len(edge.ops) for edge in edges),
    )
