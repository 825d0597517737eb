"""Cell drawings: nothing overlaps, every edge is there, files are reproducible."""

import itertools
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch

from pdarts_fast.errors import RunError
from pdarts_fast.genotype import NAMED, OPERATIONS, PRIMITIVES, Genotype
from pdarts_fast.run.cell_layout import Cell, layout_cell
from pdarts_fast.run.drawing import cell_svg_inline, draw_cell, draw_genotype
from pdarts_fast.run.palette import OP_STYLES, op_label

SEED = 7


def random_cell(nodes: int, seed: int) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [
        (rng.choice(OPERATIONS), source)
        for node in range(nodes)
        for source in rng.sample(range(2 + node), 2)
    ]


CELLS = [
    *(pytest.param(g.normal, g.normal_concat, id=f"{name} normal") for name, g in NAMED.items()),
    *(pytest.param(g.reduce, g.reduce_concat, id=f"{name} reduce") for name, g in NAMED.items()),
    *(
        pytest.param(random_cell(n, SEED + n), list(range(2, n + 2)), id=f"random {n} nodes")
        for n in (1, 2, 3, 4, 5, 6, 7)
    ),
    pytest.param([("skip_connect", 0), ("skip_connect", 0)], [2], id="one source twice"),
]


@pytest.mark.parametrize(("cell", "concat"), CELLS)
def test_no_label_node_or_box_overlaps(cell: Cell, concat: list[int]) -> None:
    figure = draw_cell(cell, concat)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    texts = [text.get_window_extent(renderer) for text in axes.texts]
    nodes = len(cell) // 2
    assert len(texts) == 3 + nodes + len(cell)
    for a, b in itertools.combinations(texts, 2):
        assert not a.overlaps(b)
    boxes = [p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch)]
    distinct = {tuple(round(edge, 3) for edge in box.extents): box for box in boxes}
    assert len(distinct) == 3 + len(cell)
    for a, b in itertools.combinations(distinct.values(), 2):
        assert not a.overlaps(b)
    canvas = figure.bbox
    assert all(canvas.x0 <= box.x0 and box.x1 <= canvas.x1 for box in [*texts, *boxes])
    assert all(canvas.y0 <= box.y0 and box.y1 <= canvas.y1 for box in [*texts, *boxes])


@pytest.mark.parametrize(("cell", "concat"), CELLS)
def test_labels_fit_their_boxes(cell: Cell, concat: list[int]) -> None:
    figure = draw_cell(cell, concat)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [p.get_window_extent() for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
    labels = {op_label(op) for op, _ in cell}
    for text in figure.axes[0].texts:
        if text.get_text() in labels:
            extent = text.get_window_extent(renderer)
            assert any(
                box.x0 < extent.x0 and extent.x1 < box.x1 and box.y0 < extent.y0 < box.y1
                for box in boxes
            )


@pytest.mark.parametrize(("cell", "concat"), CELLS)
def test_layout_has_every_edge_from_its_source(cell: Cell, concat: list[int]) -> None:
    layout = layout_cell(cell, concat)
    vertices = layout.vertices
    into_label = {r.path[-1]: r.path[0] for r in layout.routes if r.op and not r.arrow}
    drawn = []
    for route in layout.routes:
        if route.op and route.arrow:
            label, node = route.path
            source = vertices[into_label[label]].index
            drawn.append((vertices[node].index, vertices[label].op, source))
    wanted = [(2 + place // 2, op, source) for place, (op, source) in enumerate(cell)]
    assert sorted(drawn) == sorted(wanted)
    to_output = [vertices[r.path[0]].index for r in layout.routes if not r.op]
    assert sorted(to_output) == sorted(concat)
    for route in layout.routes:
        columns = [vertices[v].column for v in route.path]
        assert columns == list(range(columns[0], columns[-1] + 1))


@pytest.mark.parametrize(("cell", "concat"), CELLS)
def test_passing_edges_keep_clear_of_boxes(cell: Cell, concat: list[int]) -> None:
    layout = layout_cell(cell, concat)
    for column in layout.columns:
        heights = [layout.vertices[v].y for v in column]
        for (a, low), (b, high) in itertools.pairwise(zip(column, heights, strict=True)):
            kinds = {layout.vertices[a].kind, layout.vertices[b].kind}
            assert high - low >= (0.21 if kinds == {"via"} else 0.31), kinds


def test_published_cells_have_few_crossings() -> None:
    layout = layout_cell(NAMED["PDARTS"].normal, NAMED["PDARTS"].normal_concat)
    rank = {v: place for column in layout.columns for place, v in enumerate(column)}
    links = {
        (layout.vertices[a].column, rank[a], rank[b])
        for route in layout.routes
        for a, b in itertools.pairwise(route.path)
    }
    crossings = sum(
        a[0] == b[0] and (a[1] - b[1]) * (a[2] - b[2]) < 0
        for a, b in itertools.combinations(links, 2)
    )
    assert crossings <= 3


@pytest.mark.parametrize("name", ["PDARTS", "DARTS_V2"])
def test_draw_genotype_writes_the_same_files_twice(tmp_path: Path, name: str) -> None:
    files = draw_genotype(NAMED[name], tmp_path / "made" / "cell")
    names = ["cell-normal.svg", "cell-normal.png", "cell-reduce.svg", "cell-reduce.png"]
    assert [file.name for file in files] == names
    first = [file.read_bytes() for file in files]
    assert [
        file.read_bytes() for file in draw_genotype(NAMED[name], tmp_path / "made" / "cell")
    ] == first
    for file, content in zip(files, first, strict=True):
        if file.suffix == ".svg":
            assert ET.fromstring(content).tag.endswith("svg")
            assert b"<dc:date>" not in content
        else:
            assert content.startswith(b"\x89PNG")


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot draw to .*file.cell-normal\.svg"):
        draw_genotype(NAMED["PDARTS"], tmp_path / "file" / "cell")


def test_inline_drawings_share_a_page() -> None:
    genotype: Genotype = NAMED["PDARTS"]
    drawings = [
        cell_svg_inline(genotype.normal, genotype.normal_concat, prefix="a", description="x"),
        cell_svg_inline(genotype.reduce, genotype.reduce_concat, prefix="b", description="y"),
    ]
    ids = [found for svg in drawings for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that no scheme can change"
        assert "<style" not in svg
        assert "<metadata" not in svg
        own = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'href="#([^"]+)"', svg)) <= own
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= own
        assert ET.fromstring(svg).get("aria-label") in ("x", "y")


def test_drawing_touches_no_global_figure_state() -> None:
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    draw_cell(NAMED["PDARTS"].normal, [2, 3, 4, 5])
    cell_svg_inline(NAMED["PDARTS"].normal, [2, 3, 4, 5], prefix="a", description="x")
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def test_every_operation_has_its_own_style() -> None:
    assert set(PRIMITIVES) <= set(OPERATIONS) == set(OP_STYLES)
    for scheme in ("light", "dark"):
        colours = [getattr(style, scheme) for style in OP_STYLES.values()]
        assert len(set(colours)) == len(colours)
    assert len({style.label for style in OP_STYLES.values()}) == len(OP_STYLES)


@pytest.mark.parametrize(
    ("cell", "concat", "message"),
    [
        pytest.param([("none", 0)], [2], "two .* per node, got 1", id="odd number of pairs"),
        pytest.param([], [], "got 0", id="empty"),
        pytest.param(
            [("none", 0), ("none", 2)], [2], "node 0 .* state 2; wanted 0 to 1", id="own output"
        ),
        pytest.param([("none", 0), ("none", 1)], [3], "concatenates state 3", id="missing state"),
    ],
)
def test_malformed_cells_are_refused(
    cell: list[tuple[str, int]], concat: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_cell(cell, concat)
