"""Numbers that compare runs: mean and spread, and how far their cells agree. Numpy only."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdarts_fast.genotype import Cell
from pdarts_fast.search_space import edges

# What stands for an edge that the derived cell does not have.
UNUSED = None


@dataclass(frozen=True)
class Spread:
    """Mean and spread of one number over runs.

    Attributes:
        count: Runs that have the number.
        mean: Their mean, or None without any.
        deviation: Sample standard deviation (divisor count - 1); None below two runs.
        lowest: Smallest value, or None.
        highest: Largest value, or None.
    """

    count: int
    mean: float | None
    deviation: float | None
    lowest: float | None
    highest: float | None


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and spread of those of some values that are known and finite."""
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not known:
        return Spread(0, None, None, None, None)
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Spread(len(known), float(np.mean(known)), deviation, min(known), max(known))


@dataclass(frozen=True)
class EdgeAgreement:
    """What several derived cells have on one edge.

    Attributes:
        source: State that the edge leaves: 0 and 1 are the inputs, 2 + i is node i.
        node: Node that it enters, from 0.
        choices: Operation of each cell there, None where the cell does not use the edge.
        agreement: Share of the pairs of cells that have the same there.
    """

    source: int
    node: int
    choices: tuple[str | None, ...]
    agreement: float


@dataclass(frozen=True)
class CellAgreement:
    """How far several derived cells of one type agree.

    Attributes:
        edges: Edge by edge, numbered node by node and then by source.
        mean: Mean of the edges' agreement; unused by both counts as the same.
        shared: Mean over the pairs of cells of the share of operations that both have: the same
            operation on the same edge. Unlike `mean` it does not count what neither has.
    """

    edges: tuple[EdgeAgreement, ...]
    mean: float
    shared: float


def agreement(cells: Sequence[Cell]) -> CellAgreement | None:
    """How far cells of one type agree; None below two cells.

    Args:
        cells: (operation, source) pairs of each cell, two for each node.

    Raises:
        ValueError: The cells have different numbers of nodes.
    """
    if len(cells) < 2:
        return None
    sizes = {len(cell) for cell in cells}
    if len(sizes) > 1:
        raise ValueError(f"cells of {sorted(size // 2 for size in sizes)} nodes are not comparable")
    tables = [_by_edge(cell) for cell in cells]
    found = []
    for node, source in edges(len(cells[0]) // 2):
        choices = tuple(table.get((node, source), UNUSED) for table in tables)
        found.append(EdgeAgreement(source, node, choices, _same_pairs(choices)))
    shares = [
        len(one.items() & other.items()) / len(one)
        for one, other in itertools.combinations(tables, 2)
    ]
    return CellAgreement(
        tuple(found), float(np.mean([edge.agreement for edge in found])), float(np.mean(shares))
    )


def _by_edge(cell: Cell) -> dict[tuple[int, int], str]:
    return {(place // 2, source): op for place, (op, source) in enumerate(cell)}


def _same_pairs(choices: Sequence[str | None]) -> float:
    """Share of the pairs of equal entries."""
    counts = Counter(choices).values()
    return sum(math.comb(count, 2) for count in counts) / math.comb(len(choices), 2)
