"""Static description of a search cell: what runs on which edge, where it reads and writes.

A plan depends on channels and switch tables only, never on batch or image size. It is a pure
function of its text key, so an operator of a traced graph can carry the key as an argument.

Terms: a *branch* is one live primitive of one edge other than ``none``; a *slot* is one stored
array ``[N, H, W, C]`` that a BatchNorm follows. Pools of one source and kind share a slot: their
edges differ only in the alpha. Slots ``num_slots`` and ``num_slots + 1`` are the cell's inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Must be the contract's order: pdarts_fast.genotype.PRIMITIVES. Kernels import nothing from above.
PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)

# Numbers of `Kind` in cpu/csrc/abi.h.
CONV, MAX_POOL, AVG_POOL, FACTORIZED, POINTWISE, SKIP = range(6)

STREAMS_PER_CELL = 64


@dataclass(frozen=True)
class Branch:
    """One live primitive of one edge.

    Attributes:
        kind: CONV, MAX_POOL, AVG_POOL, FACTORIZED or SKIP.
        edge, node, source: Where; source ``2 + i`` is node ``i``.
        op: Position among the edge's live primitives: column of the alphas.
        kernel, dilation, padding, stride: Of the depthwise convolution, first half if separable.
        slot: Where the last output before BatchNorm is stored; -1 for a SKIP.
        first: Slot of the first half's output of a separable convolution, else -1.
        weights: Indices into ``Plan.weights``: depthwise, pointwise of the first half, then of
            the second; both convolutions of a FACTORIZED.
        norms: Indices into ``Plan.norms``: of the last output, and of the first half's.
        shared: Whether an earlier branch already computes the slot.
    """

    kind: int
    edge: int
    node: int
    source: int
    op: int
    stride: int
    kernel: int = 0
    dilation: int = 1
    padding: int = 0
    slot: int = -1
    first: int = -1
    weights: tuple[int, ...] = ()
    norms: tuple[int, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Plan:
    """A cell of one stage.

    Attributes:
        key: The text that ``from_key`` turns into this plan.
        channels: C of every node.
        in_channels: Of both cell inputs.
        reduction: Edges from the inputs have stride 2.
        reduction_prev: Input 0 has twice the height and width of input 1.
        steps, multiplier: Nodes, and how many of the last form the output.
        index: Place in the network: tells random streams apart.
        dropout: Whether stride-1 skips have dropout.
        num_ops: Live primitives an edge.
        branches: All branches, by edge and position.
        num_slots: Slots without the two of the inputs.
        weights: Names of the parameters, relative to the cell, in the order they are passed.
        norms: Names of the BatchNorm modules, relative to the cell.
        norm_slots: For every norm its slot.
    """

    key: str
    channels: int
    in_channels: tuple[int, int]
    reduction: bool
    reduction_prev: bool
    steps: int
    multiplier: int
    index: int
    dropout: bool
    num_ops: int
    branches: tuple[Branch, ...]
    num_slots: int
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    norm_slots: tuple[int, ...]

    def leaving(self, source: int) -> list[Branch]:
        """Branches of all edges that leave a state."""
        return [branch for branch in self.branches if branch.source == source]

    def entering(self, node: int) -> list[Branch]:
        """Branches of all edges into a node."""
        return [branch for branch in self.branches if branch.node == node]

    @property
    def num_edges(self) -> int:
        """Rows of the table of alphas."""
        return sum(range(2, 2 + self.steps))

    def stream(self, branch: Branch) -> int:
        """Dropout stream of a skip in training, -1 for none."""
        if branch.kind != SKIP or not self.dropout:
            return -1
        return self.index * STREAMS_PER_CELL + branch.edge

    def mask(self, branch: Branch) -> int:
        """Number of a skip's mask that is drawn outside of the passes, -1 for none."""
        return -1

    def input_kind(self, which: int) -> int:
        """FACTORIZED or POINTWISE: how input 0 or 1 is brought to C channels."""
        return FACTORIZED if which == 0 and self.reduction_prev else POINTWISE

    def input_weights(self, which: int) -> tuple[int, ...]:
        """Indices of the weights of an input's preprocessing."""
        if which == 0:
            return (0, 1) if self.reduction_prev else (0,)
        return (2,) if self.reduction_prev else (1,)


class _Builder:
    """Collects branches, slots and names in the order of edges and primitives."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []
        self.weights: list[str] = []
        self.norms: list[str] = []
        self.norm_slots: list[int] = []
        self.num_slots = 0
        self._pools: dict[tuple[int, int], int] = {}

    def weight(self, name: str) -> int:
        self.weights.append(f"{name}.weight")
        return len(self.weights) - 1

    def norm(self, name: str, slot: int) -> int:
        self.norms.append(name)
        self.norm_slots.append(slot)
        return len(self.norms) - 1

    def slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1

    def pool(self, kind: int, place: dict[str, Any], name: str) -> None:
        key = (kind, place["source"])
        shared = key in self._pools
        if not shared:
            self._pools[key] = self.slot()
        slot = self._pools[key]
        norms = (self.norm(f"{name}.1", slot),)
        self.branches.append(Branch(kind, **place, slot=slot, norms=norms, shared=shared))

    def skip(self, place: dict[str, Any], name: str) -> None:
        if place["stride"] == 1:
            self.branches.append(Branch(SKIP, **place))
            return
        weights = (self.weight(f"{name}.conv_1"), self.weight(f"{name}.conv_2"))
        slot = self.slot()
        norms = (self.norm(f"{name}.bn", slot),)
        self.branches.append(Branch(FACTORIZED, **place, slot=slot, weights=weights, norms=norms))

    def convolution(self, primitive: str, place: dict[str, Any], name: str) -> None:
        kernel = int(primitive[-1])
        separable = primitive.startswith("sep")
        dilation = 1 if separable else 2
        halves = 2 if separable else 1
        weights: list[int] = []
        slots: list[int] = []
        norms: list[int] = []
        for half in range(halves):
            weights += [self.weight(f"{name}.op.{4 * half + i}") for i in (1, 2)]
            slots.append(self.slot())
            norms.append(self.norm(f"{name}.op.{4 * half + 3}", slots[-1]))
        self.branches.append(
            Branch(
                CONV,
                **place,
                kernel=kernel,
                dilation=dilation,
                padding=dilation * (kernel - 1) // 2,
                slot=slots[-1],
                first=slots[0] if separable else -1,
                weights=tuple(weights),
                norms=tuple(reversed(norms)),
            )
        )

    def add(self, primitive: str, place: dict[str, Any], name: str) -> None:
        if primitive == "max_pool_3x3":
            self.pool(MAX_POOL, place, name)
        elif primitive == "avg_pool_3x3":
            self.pool(AVG_POOL, place, name)
        elif primitive == "skip_connect":
            self.skip(place, name)
        elif primitive != "none":
            self.convolution(primitive, place, name)


def make_key(
    switches: Sequence[Sequence[bool]],
    *,
    channels: int,
    in_channels: tuple[int, int],
    reduction: bool,
    reduction_prev: bool,
    steps: int,
    multiplier: int,
    index: int,
    dropout: bool,
) -> str:
    """The text that describes a cell; arguments as the attributes of ``Plan``.

    Args:
        switches: Live primitives of every edge, bool ``[edges, 8]``.
    """
    table = ["".join("1" if alive else "0" for alive in row) for row in switches]
    fields = {
        "switches": table,
        "channels": channels,
        "in_channels": list(in_channels),
        "reduction": bool(reduction),
        "reduction_prev": bool(reduction_prev),
        "steps": steps,
        "multiplier": multiplier,
        "index": index,
        "dropout": bool(dropout),
    }
    return json.dumps(fields, separators=(",", ":"))


@lru_cache(maxsize=1024)
def from_key(key: str) -> Plan:
    """The plan that ``make_key`` described.

    Raises:
        ValueError: An edge has no live primitive, or edges differ in how many they have.
    """
    fields = json.loads(key)
    table = [[mark == "1" for mark in row] for row in fields.pop("switches")]
    counts = {sum(row) for row in table}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every edge needs the same number of live primitives, got {counts}")
    build = _Builder()
    if fields["reduction_prev"]:
        names = ["preprocess0.conv_1", "preprocess0.conv_2", "preprocess1.op.1"]
        norms = ["preprocess0.bn", "preprocess1.op.2"]
    else:
        names = ["preprocess0.op.1", "preprocess1.op.1"]
        norms = ["preprocess0.op.2", "preprocess1.op.2"]
    for name in names:
        build.weight(name)
    edge = 0
    for node in range(fields["steps"]):
        for source in range(2 + node):
            stride = 2 if fields["reduction"] and source < 2 else 1
            live = [p for p, alive in zip(PRIMITIVES, table[edge], strict=True) if alive]
            for op, primitive in enumerate(live):
                place: dict[str, Any] = {
                    "edge": edge,
                    "node": node,
                    "source": source,
                    "op": op,
                    "stride": stride,
                }
                build.add(primitive, place, f"cell_ops.{edge}.m_ops.{op}")
            edge += 1
    for which, name in enumerate(norms):
        build.norm(name, build.num_slots + which)
    fields["in_channels"] = tuple(fields["in_channels"])
    return Plan(
        key=key,
        num_ops=counts.pop(),
        branches=tuple(build.branches),
        num_slots=build.num_slots,
        weights=tuple(build.weights),
        norms=tuple(build.norms),
        norm_slots=tuple(build.norm_slots),
        **fields,
    )
