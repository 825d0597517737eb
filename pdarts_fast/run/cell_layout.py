"""Layered layout of a cell: where its nodes, operation labels and edges go.

Every edge of the cell becomes source -> label -> node, and labels are vertices like any other, so
two labels can never overlap. The steps are those of layered graph drawing (Sugiyama, Tagawa and
Toda, 1981): columns by longest path, place holders where an edge passes a column, an order per
column with few crossings, then heights by isotonic regression under minimum distances.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = Sequence[tuple[str, int]]

_ORDER_STARTS = 24
_ORDER_SWEEPS = 12
_HEIGHT_SWEEPS = 120
_STRAIGHTEN_ROUNDS = 3
_ORDER_SEED = 0
_HEIGHTS = {"input": 0.62, "node": 0.62, "output": 0.62, "op": 0.42, "via": 0.22}
_WIDTHS = {"input": 0.72, "node": 0.46, "output": 0.6, "op": 1.12, "via": 0.0}
_GAP = 0.42
_GAP_PER_INCH = 0.11


@dataclass
class Vertex:
    """One thing with a place in the drawing.

    Attributes:
        kind: ``input``, ``node``, ``output``, ``op`` (a label) or ``via`` (an edge that
            passes a column).
        index: state number of an input or node (0 and 1 are the cell inputs), else -1.
        column: column number from the left.
        op: operation of a label and of the edges that belong to it, else empty.
        y: height of the centre in inches, upwards.
    """

    kind: str
    index: int
    column: int
    op: str = ""
    y: float = 0.0


@dataclass
class Route:
    """One drawn edge: the vertices it visits from left to right.

    Attributes:
        path: positions in ``Layout.vertices``.
        op: operation it carries; empty for an edge to the output.
        arrow: whether it ends in an arrow head.
    """

    path: list[int]
    op: str
    arrow: bool


@dataclass
class Layout:
    """A cell with coordinates.

    Attributes:
        vertices: everything that has a place.
        routes: the edges.
        columns: positions in ``vertices`` per column, from bottom to top.
        spans: left and right end of each column in inches.
        height: vertical extent in inches; heights start at 0.
    """

    vertices: list[Vertex] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    height: float = 0.0


def layout_cell(cell: Cell, concat: Sequence[int]) -> Layout:
    """Places a cell's inputs, nodes, operation labels, edges and output.

    Args:
        cell: two (operation, source) pairs per node; source 0 and 1 are the cell inputs.
        concat: states that the output concatenates.

    Returns:
        The layout, in inches. It depends on the arguments only.

    Raises:
        ValueError: the cell has an odd number of edges, or a source that does not come before its
            node.
    """
    layout = Layout()
    _add_graph(layout, cell, concat)
    links = _links(layout)
    _order_columns(layout, links)
    _assign_heights(layout, links)
    _assign_columns(layout, links)
    return layout


def _add_graph(layout: Layout, cell: Cell, concat: Sequence[int]) -> None:
    if not cell or len(cell) % 2:
        raise ValueError(
            f"a cell needs two (operation, source) pairs per node, got {len(cell)} pairs in all"
        )
    states = 2 + len(cell) // 2
    depth = [0, 0]
    for node in range(2, states):
        sources = [source for _, source in cell[2 * node - 4 : 2 * node - 2]]
        for source in sources:
            if not 0 <= source < node:
                raise ValueError(
                    f"node {node - 2} of the cell reads state {source}; wanted 0 to {node - 1}"
                )
        depth.append(1 + max(depth[source] for source in sources))
    for state in concat:
        if not 0 <= state < states:
            raise ValueError(f"the cell concatenates state {state}; wanted 0 to {states - 1}")
    last = 2 * max(depth) + 1
    layout.columns = [[] for _ in range(last + 1)]
    for state in range(states):
        _add(layout, Vertex("input" if state < 2 else "node", state, 2 * depth[state]))
    output = _add(layout, Vertex("output", -1, last))
    for position, (op, source) in enumerate(cell):
        node = 2 + position // 2
        label = _add(layout, Vertex("op", -1, 2 * depth[node] - 1, op))
        layout.routes.append(Route(_bridge(layout, source, label, op), op, arrow=False))
        layout.routes.append(Route([label, node], op, arrow=True))
    for state in concat:
        layout.routes.append(Route(_bridge(layout, state, output, ""), "", arrow=True))


def _add(layout: Layout, vertex: Vertex) -> int:
    layout.vertices.append(vertex)
    layout.columns[vertex.column].append(len(layout.vertices) - 1)
    return len(layout.vertices) - 1


def _bridge(layout: Layout, start: int, end: int, op: str) -> list[int]:
    between = range(layout.vertices[start].column + 1, layout.vertices[end].column)
    return [start, *(_add(layout, Vertex("via", -1, column, op)) for column in between), end]


def _links(layout: Layout) -> list[tuple[int, int]]:
    return [pair for route in layout.routes for pair in itertools.pairwise(route.path)]


def _crossings(columns: list[list[int]], links: list[tuple[int, int]]) -> int:
    """Counts pairs of links between two neighbouring columns that cross."""
    rank = {vertex: place for column in columns for place, vertex in enumerate(column)}
    column_of = {vertex: number for number, column in enumerate(columns) for vertex in column}
    by_column: dict[int, list[tuple[int, int]]] = {}
    for left, right in links:
        by_column.setdefault(column_of[left], []).append((rank[left], rank[right]))
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0
        for pairs in by_column.values()
        for place, a in enumerate(pairs)
        for b in pairs[place + 1 :]
    )


def _order_columns(layout: Layout, links: list[tuple[int, int]]) -> None:
    """Orders columns by barycentres from several seeded starts; keeps the fewest crossings."""
    rng = random.Random(_ORDER_SEED)
    neighbours: dict[int, tuple[list[int], list[int]]] = {
        vertex: ([], []) for vertex in range(len(layout.vertices))
    }
    for left, right in links:
        neighbours[right][0].append(left)
        neighbours[left][1].append(right)
    best, fewest = layout.columns, _crossings(layout.columns, links)
    for _ in range(_ORDER_STARTS):
        columns = [rng.sample(column, len(column)) for column in layout.columns]
        # c_{k-2} stands above c_{k-1} in every drawing: cells are compared side by side.
        columns[0] = [1, 0]
        for sweep in range(_ORDER_SWEEPS):
            side = sweep % 2
            numbers = range(1, len(columns)) if side == 0 else range(len(columns) - 2, 0, -1)
            for number in numbers:
                other = columns[number - 1 if side == 0 else number + 1]
                _sort_by_barycentre(columns[number], other, neighbours, side)
            count = _crossings(columns, links)
            if count < fewest:
                best, fewest = [list(column) for column in columns], count
    if best[0] != [1, 0]:
        best[0] = [1, 0]
    layout.columns = best


def _sort_by_barycentre(
    column: list[int],
    other: list[int],
    neighbours: dict[int, tuple[list[int], list[int]]],
    side: int,
) -> None:
    rank = {vertex: place for place, vertex in enumerate(other)}
    own = {vertex: place for place, vertex in enumerate(column)}

    def barycentre(vertex: int) -> float:
        near = neighbours[vertex][side]
        return sum(rank[v] for v in near) / len(near) if near else float(own[vertex])

    column.sort(key=barycentre)


def _assign_heights(layout: Layout, links: list[tuple[int, int]]) -> None:
    """Pulls vertices to their neighbours' heights; columns keep their order and distances."""
    vertices = layout.vertices
    pull: list[list[tuple[int, float]]] = [[] for _ in vertices]
    for left, right in links:
        # A passing edge that bends at a column reads worse than a short slanted one.
        weight = 6.0 if "via" in (vertices[left].kind, vertices[right].kind) else 1.0
        pull[left].append((right, weight))
        pull[right].append((left, weight))
    for column in layout.columns:
        offsets = _offsets(vertices, column)
        for position, offset in zip(column, offsets, strict=True):
            vertices[position].y = offset - offsets[-1] / 2
    for sweep in range(_HEIGHT_SWEEPS):
        for column in layout.columns if sweep % 2 else reversed(layout.columns):
            _fit_column(vertices, column, pull)
    for _ in range(_STRAIGHTEN_ROUNDS):
        for route in layout.routes:
            _straighten(layout, route)
    low = min(v.y - _HEIGHTS[v.kind] / 2 for v in vertices)
    for vertex in vertices:
        vertex.y -= low
    layout.height = max(v.y + _HEIGHTS[v.kind] / 2 for v in vertices)


def _fit_column(
    vertices: list[Vertex], column: list[int], pull: list[list[tuple[int, float]]]
) -> None:
    """Moves a column's vertices as near to their neighbours' mean heights as distances allow."""
    weights = [sum(weight for _, weight in pull[position]) or 1.0 for position in column]
    wanted = [
        sum(vertices[other].y * weight for other, weight in pull[position]) / total
        if pull[position]
        else vertices[position].y
        for position, total in zip(column, weights, strict=True)
    ]
    offsets = _offsets(vertices, column)
    free = [y - offset for y, offset in zip(wanted, offsets, strict=True)]
    for position, y, offset in zip(column, _isotonic(free, weights), offsets, strict=True):
        vertices[position].y = y + offset


def _straighten(layout: Layout, route: Route) -> None:
    """Makes a passing edge level over as many columns as leave room for that."""
    run: list[int] = []
    low, high = -math.inf, math.inf
    for position in route.path[1:-1]:
        floor, ceiling = _room(layout, position)
        if run and max(low, floor) > min(high, ceiling):
            _level(layout, route, run, low, high)
            run, low, high = [], -math.inf, math.inf
        run.append(position)
        low, high = max(low, floor), min(high, ceiling)
    if run and low <= high:
        _level(layout, route, run, low, high)


def _room(layout: Layout, position: int) -> tuple[float, float]:
    """Returns the heights between which a place holder can move without touching a neighbour."""
    vertices = layout.vertices
    column = layout.columns[vertices[position].column]
    place = column.index(position)
    low, high = -math.inf, math.inf
    if place > 0:
        below = vertices[column[place - 1]]
        low = below.y + (_HEIGHTS[below.kind] + _HEIGHTS["via"]) / 2
    if place + 1 < len(column):
        above = vertices[column[place + 1]]
        high = above.y - (_HEIGHTS[above.kind] + _HEIGHTS["via"]) / 2
    # Rounding may leave a tight place a hair too small.
    return (low, high) if low <= high else (vertices[position].y, vertices[position].y)


def _level(layout: Layout, route: Route, run: list[int], low: float, high: float) -> None:
    """Sets a run of place holders to one height: that of the edge's end or start if possible."""
    vertices = layout.vertices
    ends = (vertices[route.path[-1]].y, vertices[route.path[0]].y)
    mean = sum(vertices[position].y for position in run) / len(run)
    level = next((y for y in ends if low <= y <= high), min(max(mean, low), high))
    for position in run:
        vertices[position].y = level


def _offsets(vertices: list[Vertex], column: list[int]) -> list[float]:
    """Returns the lowest heights a column's vertices can have, its first one at 0."""
    offsets = [0.0]
    for below, above in itertools.pairwise(column):
        distance = (_HEIGHTS[vertices[below].kind] + _HEIGHTS[vertices[above].kind]) / 2
        offsets.append(offsets[-1] + distance)
    return offsets


def _isotonic(values: list[float], weights: list[float]) -> list[float]:
    """Returns the non-decreasing sequence nearest to ``values`` (weighted least squares)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, before_total, before_count = blocks.pop()
            mean = (mean * total + before * before_total) / (total + before_total)
            total, count = total + before_total, count + before_count
        blocks.append((mean, total, count))
    return [mean for mean, _, count in blocks for _ in range(count)]


def _assign_columns(layout: Layout, links: list[tuple[int, int]]) -> None:
    """Sets the columns' left and right ends; a gap widens with the climb of the edges across it."""
    vertices = layout.vertices
    left = 0.0
    for number, column in enumerate(layout.columns):
        right = left + max(_WIDTHS[vertices[vertex].kind] for vertex in column)
        layout.spans.append((left, right))
        climb = max(
            (abs(vertices[a].y - vertices[b].y) for a, b in links if vertices[a].column == number),
            default=0.0,
        )
        left = right + _GAP + _GAP_PER_INCH * climb
