"""Plans of derived cells: two operations a node, affine BatchNorm, bare pools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from pdarts_fast.cells.plan import NOTHING, CellPlan, Edge, Place, StockOp, build, place_of
from pdarts_fast.kernels import plan as plans

NUM_INPUTS = 2


def _separable(name: str, stride: int, channels: int) -> StockOp:
    halves = 2 if name.startswith("sep") else 1
    return StockOp(
        plans.CONV,
        stride,
        int(name[-1]),
        3 - halves,
        (channels, channels),
        tuple(f"op.{4 * half + i}" for half in range(halves) for i in (1, 2)),
        tuple(f"op.{4 * half + 3}" for half in range(halves)),
    )


def _factorized(in_channels: int, channels: int) -> StockOp:
    convolutions = ("conv_1", "conv_2")
    return StockOp(plans.FACTORIZED, 2, 0, 1, (in_channels, channels), convolutions, ("bn",))


def _stock_op(name: str, stride: int, channels: int) -> StockOp | None:
    """What a primitive computes in a derived cell; None if the kernels have it not."""
    if name in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"):
        return _separable(name, stride, channels)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        return StockOp(plans.MAX_POOL if name.startswith("max") else plans.AVG_POOL, stride)
    if name == "skip_connect":
        return StockOp(plans.SKIP, 1) if stride == 1 else _factorized(channels, channels)
    return StockOp(NOTHING, stride) if name == "none" else None


def _input_op(kind: int, in_channels: int, channels: int) -> StockOp:
    if kind == plans.FACTORIZED:
        return _factorized(in_channels, channels)
    return StockOp(plans.POINTWISE, 1, 0, 1, (in_channels, channels), ("op.1",), ("op.2",))


def runs(operations: Sequence[str]) -> bool:
    """Whether the kernels have all of a cell's primitives."""
    return all(_stock_op(name, 1, 1) is not None for name in operations)


def make_key(
    pairs: Sequence[tuple[str, int]],
    concat: Sequence[int],
    *,
    channels: int,
    in_channels: tuple[int, int],
    reduction: bool,
    reduction_prev: bool,
) -> str:
    """The text that describes a derived cell.

    Args:
        pairs: Primitive and source of every operation, two a node; as in a genotype.
        concat: States that the output concatenates.
        channels, in_channels, reduction, reduction_prev: As in ``kernels.plan.Plan``.
    """
    fields = {
        "pairs": [list(pair) for pair in pairs],
        "concat": list(concat),
        "channels": channels,
        "in_channels": list(in_channels),
        "reduction": bool(reduction),
        "reduction_prev": bool(reduction_prev),
    }
    return json.dumps(fields, separators=(",", ":"))


@lru_cache(maxsize=1024)
def from_key(key: str) -> CellPlan:
    """The plan that ``make_key`` described.

    Raises:
        ValueError: A primitive is none that the kernels have.
    """
    fields = json.loads(key)
    channels, reduction = fields["channels"], fields["reduction"]
    found = []
    for number, (name, source) in enumerate(fields["pairs"]):
        op = _stock_op(name, 2 if reduction and source < NUM_INPUTS else 1, channels)
        if op is None:
            raise ValueError(f"the kernels have no {name}")
        found.append(Edge(number // 2, source, (op,), (f"_ops.{number}",)))
    kinds = (plans.FACTORIZED if fields["reduction_prev"] else plans.POINTWISE, plans.POINTWISE)
    first, second = (
        _input_op(kind, count, channels)
        for kind, count in zip(kinds, fields["in_channels"], strict=True)
    )
    plan = build(
        found,
        (first, second),
        ("preprocess0", "preprocess1"),
        channels=channels,
        in_channels=tuple(fields["in_channels"]),
        reduction=reduction,
        steps=len(found) // 2,
        concat=tuple(state - NUM_INPUTS for state in fields["concat"]),
    )
    return replace(plan, affine=True)


def masked_places(plan: CellPlan) -> list[Place]:
    """Operations behind drop-path, in the order in which their masks are drawn."""
    return sorted(place_of(b) for b in plan.branches if b.kind != plans.SKIP)
