"""Draws the cells of a genotype as directed graphs, to SVG and PNG.

Matplotlib's object interface with the Agg canvas: no window, no pyplot state, no Graphviz.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve

from pdarts_fast.errors import RunError
from pdarts_fast.run.cell_layout import Cell, Layout, Route, Vertex, layout_cell
from pdarts_fast.run.palette import INK, MUTED, OP_STYLES, SURFACE, op_label, op_style, op_variable

_MARGIN = 0.16
_TITLE_HEIGHT = 0.36
_LABEL_HEIGHT = 0.29
_NODE_RADIUS = 0.2
_BOX_HEIGHT = 0.38
_ARROW = 0.11
_ENTRY_RISE = 0.08
_PNG_DPI = 200
# An inlined drawing scrolls on a narrow screen rather than shrink below this share of its size.
_SMALLEST = 0.8
# Deterministic ids: the same genotype gives the same file, byte for byte.
_SVG_SETTINGS: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "pdarts_fast"}
_NO_METADATA = {"Date": None, "Creator": None}


class GenotypeLike(Protocol):
    """What a drawing needs of a genotype: the fields of ``pdarts_fast.genotype.Genotype``."""

    @property
    def normal(self) -> Cell: ...
    @property
    def normal_concat(self) -> Sequence[int]: ...
    @property
    def reduce(self) -> Cell: ...
    @property
    def reduce_concat(self) -> Sequence[int]: ...


def draw_cell(cell: Cell, concat: Sequence[int], *, title: str | None = None) -> Figure:
    """Draws one cell from left to right: inputs, nodes with their two operations, output.

    Args:
        cell: two (operation, source) pairs per node; source 0 and 1 are the cell inputs.
        concat: states that the output concatenates.
        title: heading, or None for none.

    Returns:
        A figure of the drawing's own size, with an Agg canvas.

    Raises:
        ValueError: the cell has an odd number of edges, or a source that does not come before its
            node.
    """
    layout = layout_cell(cell, concat)
    width = layout.spans[-1][1] + 2 * _MARGIN
    height = layout.height + 2 * _MARGIN
    top = _TITLE_HEIGHT if title else 0.0
    figure = Figure(figsize=(width, height + top), facecolor=SURFACE["light"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN, width - _MARGIN)
    axes.set_ylim(-_MARGIN, height + top - _MARGIN)
    if title:
        axes.text(
            0, height + top - _MARGIN - 0.16, title, va="top", fontsize=12, weight="bold",
            color=INK["light"],
        )  # fmt: skip
    # Edges to the output go first: the operations of the cell are drawn over them.
    for route in sorted(layout.routes, key=lambda route: bool(route.op)):
        _draw_route(axes, layout, route)
    for vertex in layout.vertices:
        _draw_vertex(axes, layout, vertex)
    return figure


def draw_genotype(genotype: GenotypeLike, out_prefix: Path | str) -> list[Path]:
    """Draws both cells to ``PREFIX-normal`` and ``PREFIX-reduce``, each as ``.svg`` and ``.png``.

    Args:
        genotype: the genotype to draw.
        out_prefix: start of the four file names; missing folders are made.

    Returns:
        The four files: normal SVG, normal PNG, reduction SVG, reduction PNG.

    Raises:
        ValueError: a cell is malformed.
        RunError: a file cannot be written.
    """
    prefix = Path(out_prefix)
    files: list[Path] = []
    for name, title, cell, concat in (
        ("normal", "Normal cell", genotype.normal, genotype.normal_concat),
        ("reduce", "Reduction cell", genotype.reduce, genotype.reduce_concat),
    ):
        figure = draw_cell(cell, concat, title=title)
        svg = prefix.with_name(f"{prefix.name}-{name}.svg")
        png = prefix.with_name(f"{prefix.name}-{name}.png")
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            svg.write_text(_figure_svg(figure), encoding="utf-8")
            figure.savefig(png, dpi=_PNG_DPI, metadata={"Software": None})
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"cannot draw to {svg} and {png}: {reason}") from error
        files += [svg, png]
    return files


def cell_svg_inline(cell: Cell, concat: Sequence[int], *, prefix: str, description: str) -> str:
    """Draws one cell as SVG to be placed inside an HTML page.

    Colours are CSS variables (``--ink``, ``--muted``, ``--surface``, ``--op-...``), so the drawing
    follows the page's colour scheme; ids start with ``prefix``, so several drawings can share one
    page.

    Args:
        cell: two (operation, source) pairs per node.
        concat: states that the output concatenates.
        prefix: start of every id; letters, digits and hyphens.
        description: what a screen reader says; already escaped for an HTML attribute.
    """
    svg = _figure_svg(draw_cell(cell, concat))
    svg = svg[svg.index("<svg") :]
    # Page-wide rules ("*{...}") and metadata of a stand-alone file have no place in a page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    for colour, variable in _variables().items():
        svg = svg.replace(colour, f"var({variable})")
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    width = re.search(r'width="([\d.]+)pt"', head)
    if view_box is None or width is None:
        raise RuntimeError(f"matplotlib {matplotlib.__version__} wrote an SVG without a size")
    pixels = float(width[1]) * 4 / 3
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box[0]} role="img" aria-label="{description}" class="cell" '
        f'style="max-width:{pixels:.0f}px;min-width:{_SMALLEST * pixels:.0f}px">{body}'
    )


def _variables() -> dict[str, str]:
    named = {INK["light"]: "--ink", MUTED["light"]: "--muted", SURFACE["light"]: "--surface"}
    return named | {style.light: op_variable(op) for op, style in OP_STYLES.items()}


def _figure_svg(figure: Figure) -> str:
    stream = io.StringIO()
    with matplotlib.rc_context(_SVG_SETTINGS):
        figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    return stream.getvalue()


def _draw_route(axes, layout: Layout, route: Route) -> None:
    """Draws an edge: level across the columns it passes, curved in the gaps between them."""
    colour = op_style(route.op).light if route.op else MUTED["light"]
    width = 1.5 if route.op else 1.0
    tip, tip_y = _entry(layout, route)
    points, codes = [], []
    for start, end in itertools.pairwise(route.path):
        x0, y0 = _side(layout, start, right=True), layout.vertices[start].y
        x1, y1 = _side(layout, end, right=False), layout.vertices[end].y
        if route.arrow and end == route.path[-1]:
            x1, y1 = tip - _ARROW * 0.8, tip_y
        points.append((x0, y0))
        codes.append(Curve.LINETO if len(points) > 1 else Curve.MOVETO)
        left, right = _gap(layout, start)
        left, right = max(left, x0), min(right, x1)
        bend = (left + right) / 2
        points += [(left, y0), (bend, y0), (bend, y1), (right, y1), (x1, y1)]
        codes += [Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO]
    axes.add_patch(
        PathPatch(
            Curve(points, codes),
            facecolor="none",
            edgecolor=colour,
            linewidth=width,
            linestyle="-" if route.op != "none" else (0, (2, 2)),
            capstyle="round",
        )
    )
    if route.arrow:
        base, half = tip - _ARROW, _ARROW * 0.45
        corners = [(tip, tip_y), (base, tip_y + half), (base, tip_y - half)]
        axes.add_patch(Polygon(corners, closed=True, facecolor=colour, edgecolor="none"))


def _gap(layout: Layout, vertex: int) -> tuple[float, float]:
    column = layout.vertices[vertex].column
    return layout.spans[column][1], layout.spans[column + 1][0]


def _entry(layout: Layout, route: Route) -> tuple[float, float]:
    """Returns the tip of an edge's arrow; the two edges of a node keep their arrows apart."""
    before, end = (layout.vertices[position] for position in route.path[-2:])
    if end.kind != "node":
        return _side(layout, route.path[-1], right=False), end.y
    rivals = [
        layout.vertices[other.path[-2]].y
        for other in layout.routes
        if other.arrow and other.path[-1] == route.path[-1]
    ]
    rise = _ENTRY_RISE if before.y == max(rivals) else -_ENTRY_RISE
    left, right = layout.spans[end.column]
    return (left + right) / 2 - math.sqrt(_NODE_RADIUS**2 - rise**2), end.y + rise


def _side(layout: Layout, position: int, *, right: bool) -> float:
    """Returns where an edge leaves (right) or meets (left) a vertex, in inches."""
    vertex = layout.vertices[position]
    left_end, right_end = layout.spans[vertex.column]
    if vertex.kind == "node":
        centre = (left_end + right_end) / 2
        return centre + _NODE_RADIUS if right else centre - _NODE_RADIUS
    return right_end if right else left_end


def _draw_vertex(axes, layout: Layout, vertex: Vertex) -> None:
    left, right = layout.spans[vertex.column]
    centre = (left + right) / 2
    ink, muted, surface = INK["light"], MUTED["light"], SURFACE["light"]
    if vertex.kind == "op":
        colour = op_style(vertex.op).light
        _draw_box(axes, left, right, vertex.y, _LABEL_HEIGHT, surface, "none", 1.0)
        _draw_box(axes, left, right, vertex.y, _LABEL_HEIGHT, colour, colour, 0.16)
        _draw_text(axes, centre, vertex.y, op_label(vertex.op), 8.5, ink)
    elif vertex.kind == "node":
        circle = Circle(
            (centre, vertex.y), _NODE_RADIUS, facecolor=surface, edgecolor=ink, linewidth=1.3
        )
        axes.add_patch(circle)
        _draw_text(axes, centre, vertex.y, str(vertex.index - 2), 10, ink)
    elif vertex.kind in ("input", "output"):
        name = {0: "$c_{k{-}2}$", 1: "$c_{k{-}1}$"}.get(vertex.index, "$c_{k}$")
        _draw_box(axes, left, right, vertex.y, _BOX_HEIGHT, muted, muted, 0.12)
        _draw_text(axes, centre, vertex.y, name, 12, ink)


def _draw_text(axes, x: float, y: float, text: str, size: float, colour: str) -> None:
    axes.text(x, y, text, ha="center", va="center_baseline", fontsize=size, color=colour)


def _draw_box(
    axes, left: float, right: float, y: float, height: float, fill: str, edge: str, alpha: float
) -> None:
    """Draws a rounded box whose fill has ``alpha`` and whose outline is opaque."""
    rounding = min(0.1, height / 2)
    box = FancyBboxPatch(
        (left, y - height / 2), right - left, height, linewidth=1.2,
        boxstyle=f"round,pad=0,rounding_size={rounding}",
        facecolor=matplotlib.colors.to_rgba(fill, alpha), edgecolor=edge,
    )  # fmt: skip
    axes.add_patch(box)
