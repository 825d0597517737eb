"""Finds the cells of a network by their structure and reads from each what it computes.

A *search cell* has two modules that preprocess its inputs and a list of mixed operations, each of
which holds nothing but a list of operations. A *derived cell* has a list of operations in place of
the mixed ones, and lists of numbers that say where they read and what the output concatenates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from pdarts_fast.cells import plan as cell_plan
from pdarts_fast.cells.plan import CellPlan, Edge, join
from pdarts_fast.dropin.stock_ops import CUSTOM, StockOp, recognise_input, recognise_op
from pdarts_fast.kernels.plan import CONV, FACTORIZED, POINTWISE
from pdarts_fast.search_space import NUM_INPUTS, edges, num_nodes


class NotRecognised(Exception):
    """Why a cell is left as it is; one line."""


@dataclass(frozen=True)
class Recipe:
    """What a cell computes.

    Attributes:
        plan: The cell.
        searches: Whether it is a search cell, called with weights; else a derived cell, called
            with a drop-path probability.
        input_paths: Paths of both preprocessing modules.
        weights_as_list: Whether the weights of the edges come as a list of vectors.
        drop_path: Whether drop-path draws its masks as ours does.
        even: Whether only inputs of even height and width were found to agree.
    """

    plan: CellPlan
    searches: bool
    input_paths: tuple[str, str]
    weights_as_list: bool = False
    drop_path: bool = True
    even: bool = True


def _list_of_ops(module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a mixed operation's operations, or None if it is no mixed operation."""
    lists = [(n, m) for n, m in module.named_children() if isinstance(m, nn.ModuleList) and len(m)]
    return lists[0] if len(lists) == 1 else None


def _operation_lists(cell: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    return [(n, m) for n, m in cell.named_children() if isinstance(m, nn.ModuleList) and len(m)]


def _inputs(cell: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in cell.named_children() if not isinstance(m, nn.ModuleList)]


def _mixes(module: nn.Module) -> bool:
    """Whether a module is a mixed operation: a list of modules that hold no lists."""
    ops = _list_of_ops(module)
    return ops is not None and all(_list_of_ops(op) is None for op in ops[1])


def find_cells(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a model that has the shape of a cell."""
    for path, module in model.named_modules():
        lists, inputs = _operation_lists(module), _inputs(module)
        if len(lists) != 1 or len(inputs) < NUM_INPUTS:
            continue
        operations = list(lists[0][1])
        if any(_mixes(op) for op in operations) or _wirings(module, len(operations)):
            yield path, module


def recognise(cell: nn.Module) -> list[Recipe]:
    """What a cell may compute: candidates, likeliest first, to be tried out.

    Raises:
        NotRecognised: It is no cell that the kernels could run.
    """
    inputs = _inputs(cell)
    lists = _operation_lists(cell)
    if len(lists) != 1 or len(inputs) != NUM_INPUTS:
        names = ", ".join(name for name, _ in inputs[NUM_INPUTS:]) or "no list of operations"
        raise NotRecognised(f"it holds {names} beside two inputs and its operations")
    if cell._parameters or cell._buffers:
        raise NotRecognised("it has parameters or buffers of its own")
    list_name, operations = lists[0]
    if all(_mixes(op) for op in operations):
        wirings = [_search_wiring(list_name, operations)]
    else:
        found = _wirings(cell, len(operations))
        if not found:
            raise NotRecognised("some of its edges are no mixed operations")
        wirings = [_derived_wiring(list_name, operations, *one) for one in found]
    paths = (inputs[0][0], inputs[1][0])
    ops = (recognise_input(inputs[0][1]), recognise_input(inputs[1][1]))
    return [_recipe(cell, wiring, paths, ops) for wiring in wirings]


@dataclass(frozen=True)
class _Wiring:
    edges: tuple[Edge, ...]
    steps: int
    concat: tuple[int, ...] | None
    searches: bool


def _search_wiring(list_name: str, operations: nn.ModuleList) -> _Wiring:
    try:
        steps = num_nodes(len(operations))
    except ValueError as error:
        raise NotRecognised(str(error)) from error
    found = []
    for number, (mixed, (node, source)) in enumerate(zip(operations, edges(steps), strict=True)):
        others = [name for name, _ in mixed.named_children()]
        ops = _list_of_ops(mixed)
        if ops is None or len(others) != 1 or mixed._parameters or mixed._buffers:
            raise NotRecognised(
                f"its mixed operation {list_name}.{number} holds more than one list of operations "
                f"({', '.join(others)}), as partial channels do"
            )
        paths = tuple(join(list_name, str(number), ops[0], str(k)) for k in range(len(ops[1])))
        found.append(Edge(node, source, tuple(map(recognise_op, ops[1])), paths))
    return _Wiring(tuple(found), steps, None, True)


def _numbers(value: object) -> tuple[int, ...] | None:
    """A non-empty sequence of ints as a tuple."""
    if not isinstance(value, (list, tuple, range)) or not value:
        return None
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in value):
        return None
    return tuple(value)


def _wirings(cell: nn.Module, count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(sources, states of the output) that the attributes of a derived cell may mean."""
    if count % 2:
        return []
    numbers = [n for n in map(_numbers, vars(cell).values()) if n is not None]
    sources = [
        n for n in numbers if len(n) == count and all(s < 2 + i // 2 for i, s in enumerate(n))
    ]
    last = 2 + count // 2
    concats = [n for n in numbers if len({*n}) == len(n) and all(2 <= s < last for s in n)]
    return [(s, c) for s in sources for c in concats if s is not c]


def _derived_wiring(
    list_name: str, operations: nn.ModuleList, sources: Sequence[int], concat: Sequence[int]
) -> _Wiring:
    found = [
        Edge(k // 2, source, (recognise_op(op),), (join(list_name, str(k)),))
        for k, (op, source) in enumerate(zip(operations, sources, strict=True))
    ]
    nodes = tuple(state - NUM_INPUTS for state in concat)
    return _Wiring(tuple(found), len(operations) // 2, nodes, False)


def _recipe(
    cell: nn.Module, wiring: _Wiring, paths: tuple[str, str], inputs: tuple[StockOp, StockOp]
) -> Recipe:
    channels = _channels(wiring.edges, inputs)
    reduction = _is_reduction(wiring.edges)
    known = tuple(_fit(edge, channels, reduction) for edge in wiring.edges)
    if not any(op.kind == CONV for edge in known for op in edge.ops):
        raise NotRecognised("none of its operations is a separable convolution that kernels know")
    inside = (
        inputs[0].kind in (POINTWISE, FACTORIZED)
        and inputs[1].kind == POINTWISE
        and all(op.channels is not None and op.channels[1] == channels for op in inputs)
    )
    in_channels = (channels, channels)
    if inside:
        in_channels = (inputs[0].channels[0], inputs[1].channels[0])  # type: ignore[index]
    plan = cell_plan.build(
        known,
        inputs if inside else None,
        paths,
        channels=channels,
        in_channels=in_channels,
        reduction=reduction,
        steps=wiring.steps,
        concat=wiring.concat or tuple(range(wiring.steps)),
    )
    norms = [cell.get_submodule(path) for path in plan.norms]
    affine = any(isinstance(norm, nn.BatchNorm2d) and norm.affine for norm in norms)
    return Recipe(replace(plan, affine=affine), wiring.searches, paths)


def _channels(found: Sequence[Edge], inputs: tuple[StockOp, StockOp]) -> int:
    """C of the nodes."""
    all_ops = [op for edge in found for op in edge.ops]
    counts = {op.channels[1] for op in [*inputs, *all_ops] if op.channels is not None}
    if len(counts) != 1:
        got = ", ".join(map(str, sorted(counts))) or "none"
        raise NotRecognised(f"its operations differ in their channels ({got})")
    return counts.pop()


def _is_reduction(found: Sequence[Edge]) -> bool:
    """Whether edges that leave the inputs have stride 2."""
    strides = {
        op.stride for edge in found if edge.source < NUM_INPUTS for op in edge.ops if op.stride
    }
    if len(strides) > 1:
        raise NotRecognised("operations on its inputs differ in their stride")
    return strides == {2}


def _fit(edge: Edge, channels: int, reduction: bool) -> Edge:
    """The edge with operations of unusual stride or channels as custom ones."""
    wanted = 2 if reduction and edge.source < NUM_INPUTS else 1
    ops = []
    for op in edge.ops:
        usual = op.stride == wanted and op.channels in (None, (channels, channels))
        ops.append(op if op.kind == CUSTOM or usual else StockOp(CUSTOM))
    return Edge(edge.node, edge.source, tuple(ops), edge.paths)


def describe(recipe: Recipe) -> str:
    """What of a cell stays with its own modules, for the log; empty if nothing does."""
    notes = []
    if recipe.plan.extras:
        notes.append(f"{len(recipe.plan.extras)} custom operations")
    if recipe.plan.outside:
        notes.append("preprocessing")
    return " and ".join(notes)
