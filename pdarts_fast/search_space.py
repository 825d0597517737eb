"""The search space and its decisions: edges, switch tables, dropping, deriving, skip restriction.

Plain numpy. A cell type is an array over its E edges, numbered node by node and then by source
(E = 14 for 4 nodes). For both cell types together:

* switches: {"normal": bool [E, 8], "reduce": bool [E, 8]}, which primitives are alive on an edge;
* alphas: {"normal": float [E, k], "reduce": float [E, k]}, before softmax; column j belongs to the
  j-th live primitive of that edge.

Probabilities are computed in float64 and rounded to float32, the precision of the parameters: the
same on every machine, and what float32 cannot tell apart is a tie.

Source: arXiv 1904.12760, sections 3.3 and 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES, Cell, Genotype, count_skips

CELL_TYPES = ("normal", "reduce")
NUM_NODES = 4
NUM_INPUTS = 2
MAX_SKIPS = 2  # the paper's choice

Switches = dict[str, npt.NDArray[np.bool_]]
Alphas = Mapping[str, npt.ArrayLike]

_NONE = PRIMITIVES.index("none")
_SKIP = PRIMITIVES.index("skip_connect")


@dataclass(frozen=True)
class Derivation:
    """What the alphas of all stages decide.

    Attributes:
        switches: Table of live primitives after each stage, the last with one per edge.
        genotype: The result without skip restriction.
        restricted: The genotype with at most M skips in the normal cell for M = 2 * nodes, ..., 0.
            An M that the last stage's live primitives cannot reach is absent.
    """

    switches: list[Switches]
    genotype: Genotype
    restricted: dict[int, Genotype]


def edges(nodes: int = NUM_NODES) -> list[tuple[int, int]]:
    """(node, source) of every edge in order; source 0 and 1 are the inputs, 2 + i is node i."""
    return [(node, source) for node in range(nodes) for source in range(NUM_INPUTS + node)]


def node_edges(node: int) -> range:
    """Indices of the edges into a node, by source."""
    first = node * NUM_INPUTS + node * (node - 1) // 2
    return range(first, first + NUM_INPUTS + node)


def edge_index(node: int, source: int) -> int:
    """Index of the edge from a source into a node."""
    return node_edges(node)[source]


def num_nodes(num_edges: int, where: str = "") -> int:
    """Number of nodes of a cell with so many edges.

    Args:
        num_edges: Edges of the cell.
        where: What to name first in an error.

    Raises:
        UsageError: No cell has that number of edges.
    """
    nodes = (math.isqrt(9 + 8 * max(num_edges, 0)) - 3) // 2
    if nodes < 1 or node_edges(nodes).start != num_edges:
        place = f"{where}: " if where else ""
        raise UsageError(
            f"{place}no cell has {num_edges} edges (2, 5, 9, 14, 20, ... for 1, 2, ... nodes)"
        )
    return nodes


def all_switches(nodes: int = NUM_NODES) -> Switches:
    """The table a search starts with: every primitive alive on every edge of both cell types."""
    shape = (node_edges(nodes).start, len(PRIMITIVES))
    return {cell: np.ones(shape, dtype=bool) for cell in CELL_TYPES}


def live_ops(switches: Mapping[str, npt.ArrayLike]) -> int:
    """Number k of live primitives, the same on every edge of both cell types.

    Raises:
        UsageError: A table is missing, has the wrong shape, or its edges differ in number.
    """
    return check_switches(switches)[1]


def live_names(table: npt.ArrayLike) -> list[list[str]]:
    """Names of the live primitives on each edge of one bool [E, 8] table."""
    return [[PRIMITIVES[op] for op in np.flatnonzero(row)] for row in np.asarray(table)]


def probabilities(alphas: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Softmax of one cell type's alphas, [E, k]: over the ops of an edge, over edges if k = 1."""
    values = np.asarray(alphas, dtype=np.float64)
    axis = 0 if values.shape[1] == 1 else 1
    exponentials = np.exp(values - values.max(axis=axis, keepdims=True))
    return (exponentials / exponentials.sum(axis=axis, keepdims=True)).astype(np.float32)


def entropy(alphas: npt.ArrayLike) -> float:
    """Mean over edges of the entropy of softmax(alphas) over the ops of an edge, in nats."""
    values = np.asarray(alphas, dtype=np.float64)
    shifted = values - values.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(np.exp(logs) * logs).sum(axis=1).mean())


def drop_ops(switches: Mapping[str, npt.ArrayLike], alphas: Alphas, k: int) -> Switches:
    """Drops the k least probable primitives of every edge (rule 1).

    Of equally probable ones the first in contract order goes; ``none`` is not protected.

    Args:
        switches: Tables that were live while the alphas were trained; left unchanged.
        alphas: The alphas of the stage.
        k: How many to drop, fewer than are alive.

    Returns:
        The tables of the next stage.

    Raises:
        UsageError: Tables, alphas and k do not fit each other.
    """
    tables, dense, alive = _read(switches, alphas)
    if not 0 <= k < alive:
        raise UsageError(f"cannot drop {k} ops of {alive} on an edge; wanted 0 to {alive - 1}")
    return {cell: _drop(tables[cell], dense[cell], k, none_first=False) for cell in CELL_TYPES}


def final_drop(switches: Mapping[str, npt.ArrayLike], alphas: Alphas) -> Switches:
    """Leaves one primitive per edge: drops ``none`` first, then the least probable (rule 2).

    Args:
        switches: Tables that were live in the last stage; left unchanged.
        alphas: The alphas of the last stage.

    Raises:
        UsageError: Tables and alphas do not fit each other.
    """
    tables, dense, alive = _read(switches, alphas)
    return {cell: _drop(tables[cell], dense[cell], alive - 1, True) for cell in CELL_TYPES}


def genotype_of(switches: Mapping[str, npt.ArrayLike], alphas: Alphas) -> Genotype:
    """Genotype of the last stage, without skip restriction (rules 2 and 3).

    Args:
        switches: Tables that were live in the last stage (before `final_drop`).
        alphas: The alphas of the last stage.

    Raises:
        UsageError: Tables and alphas do not fit each other.
    """
    tables, dense, _ = _read(switches, alphas)
    return _genotype(*(_select(tables[cell], dense[cell]) for cell in CELL_TYPES))


def restrict_skips(switches: Mapping[str, npt.ArrayLike], alphas: Alphas) -> dict[int, Genotype]:
    """Genotypes with at most M skips in the normal cell, for M = 2 * nodes down to 0 (rule 4).

    While there are too many, the least probable chosen skip is barred and both edges and
    operations are chosen again; what is barred stays barred for smaller M. Other skips may enter.

    Args:
        switches: Tables that were live in the last stage (before `final_drop`).
        alphas: The alphas of the last stage.

    Returns:
        M -> genotype, largest M first. It ends early at an M that cannot be reached, which needs
        an edge with nothing else alive than ``skip_connect`` and perhaps ``none``.

    Raises:
        UsageError: Tables and alphas do not fit each other.
    """
    tables, dense, alive = _read(switches, alphas)
    normal = dense["normal"]
    cell, reduce = (_select(tables[name], dense[name]) for name in CELL_TYPES)
    restricted: dict[int, Genotype] = {}
    for most in range(len(cell), -1, -1):
        while count_skips(cell) > most:
            chosen = _drop(tables["normal"], normal, alive - 1, True)[:, _SKIP]
            candidates = np.where(chosen & (normal[:, _SKIP] > _BARRED), normal[:, _SKIP], np.inf)
            weakest = int(candidates.argmin())
            if not np.isfinite(candidates[weakest]):
                return restricted
            normal[weakest, _SKIP] = _BARRED
            cell = _select(tables["normal"], normal)
        restricted[most] = _genotype(cell, reduce)
    return restricted


def derive(
    alphas: Sequence[Alphas], switches: Mapping[str, npt.ArrayLike] | None = None
) -> Derivation:
    """Replays all decisions of a search from the alphas at the end of each stage.

    How many primitives each stage keeps follows from the widths of the tables (8, 5, 3 in the
    paper).

    Args:
        alphas: One {"normal": [E, k], "reduce": [E, k]} per stage, raw (before softmax), read as
            float32.
        switches: Tables of the first stage; all primitives alive if not given.

    Raises:
        UsageError: The alphas are empty, not finite, or of shapes that do not follow each other.
    """
    stages = [check_alphas(stage, f"stage {i}") for i, stage in enumerate(alphas, start=1)]
    if not stages:
        raise UsageError("alphas: wanted at least one stage, got none")
    num_edges = len(stages[0]["normal"])
    live: Mapping[str, npt.ArrayLike] = (
        all_switches(num_nodes(num_edges)) if switches is None else switches
    )
    tables = []
    for i, (stage, following) in enumerate(pairwise(stages), start=2):
        width, kept = stage["normal"].shape[1], following["normal"].shape[1]
        if kept > width or len(following["normal"]) != num_edges:
            raise UsageError(
                f"stage {i}: alphas are {_size(following)} after {_size(stage)}; "
                "wanted the same edges and no more ops"
            )
        tables.append(drop_ops(live, stage, width - kept))
        live = tables[-1]
    tables.append(final_drop(live, stages[-1]))
    return Derivation(tables, genotype_of(live, stages[-1]), restrict_skips(live, stages[-1]))


def check_alphas(alphas: Any, where: str = "alphas") -> dict[str, npt.NDArray[np.float32]]:
    """Checks one stage's alphas and returns them as float32 arrays of their own.

    Args:
        alphas: {"normal": [E, k], "reduce": [E, k]}, anything that numpy reads as numbers.
        where: What to call them in an error.

    Raises:
        UsageError: A cell type is missing, not an [E, k] table of finite numbers with 1 <= k <= 8
            and E the edges of a cell, or the two differ in shape.
    """
    if not isinstance(alphas, Mapping):
        raise UsageError(f"{where}: wanted normal and reduce, got {type(alphas).__name__}")
    checked = {}
    for cell in CELL_TYPES:
        if cell not in alphas:
            raise UsageError(f"{where}: has no {cell}")
        try:
            with np.errstate(over="ignore"):
                table = np.array(alphas[cell], dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{where}: {cell} is no table of numbers ({error})") from error
        if table.ndim != 2 or not 1 <= table.shape[1] <= len(PRIMITIVES):
            raise UsageError(
                f"{where}: {cell} has shape {list(table.shape)}; wanted edges by 1 to "
                f"{len(PRIMITIVES)} ops"
            )
        num_nodes(len(table), where)
        if not np.isfinite(table).all():
            edge, op = np.argwhere(~np.isfinite(table))[0]
            raise UsageError(f"{where}: {cell}[{edge}][{op}] is {table[edge, op]}, not finite")
        checked[cell] = table
    if checked["normal"].shape != checked["reduce"].shape:
        raise UsageError(
            f"{where}: normal is {list(checked['normal'].shape)} but reduce is "
            f"{list(checked['reduce'].shape)}; wanted equal shapes"
        )
    return checked


def check_switches(switches: Any) -> tuple[Switches, int]:
    """Checks switch tables and returns them as bool arrays of their own, with the ops per edge.

    Args:
        switches: {"normal": [E, 8], "reduce": [E, 8]} of booleans.

    Raises:
        UsageError: A table is missing, has the wrong shape or values, or its edges differ in
            their number of live primitives.
    """
    tables = {}
    for cell in CELL_TYPES:
        if not isinstance(switches, Mapping) or cell not in switches:
            raise UsageError(f"switches: has no {cell}")
        try:
            table = np.array(switches[cell])
        except ValueError as error:
            raise UsageError(f"switches: {cell} is no table ({error})") from error
        if table.dtype != bool or table.ndim != 2 or table.shape[1] != len(PRIMITIVES):
            raise UsageError(
                f"switches: {cell} is {table.dtype} {list(table.shape)}; wanted booleans, "
                f"edges by {len(PRIMITIVES)}"
            )
        num_nodes(len(table))
        tables[cell] = table
    if tables["normal"].shape != tables["reduce"].shape:
        raise UsageError("switches: normal and reduce have different numbers of edges")
    counts = np.concatenate([tables[cell].sum(axis=1) for cell in CELL_TYPES])
    if counts.min() != counts.max() or counts.min() == 0:
        raise UsageError(
            f"switches: {counts.min()} to {counts.max()} live ops on an edge; wanted the same "
            "number, at least 1, on every edge of both cell types"
        )
    return tables, int(counts[0])


# Below every probability, so that a barred skip also loses to ops whose probability underflowed.
_BARRED = np.float32(-1)


def _read(
    switches: Mapping[str, npt.ArrayLike], alphas: Alphas
) -> tuple[Switches, dict[str, npt.NDArray[np.float32]], int]:
    """Tables, probabilities as [E, 8] (0 where dead), and the live ops per edge."""
    tables, alive = check_switches(switches)
    stage = check_alphas(alphas)
    if stage["normal"].shape != (len(tables["normal"]), alive):
        raise UsageError(
            f"alphas: are {_size(stage)} but the switches have {len(tables['normal'])} edges with "
            f"{alive} live ops"
        )
    dense = {}
    for cell in CELL_TYPES:
        dense[cell] = np.zeros(tables[cell].shape, dtype=np.float32)
        dense[cell][tables[cell]] = probabilities(stage[cell]).ravel()
    return tables, dense, alive


def _drop(
    table: npt.NDArray[np.bool_], dense: npt.NDArray[np.float32], k: int, none_first: bool
) -> npt.NDArray[np.bool_]:
    rank = np.where(table, dense, np.inf)
    if none_first:
        rank[table[:, _NONE], _NONE] = -np.inf
    lowest = np.argsort(rank, axis=1, kind="stable")[:, :k]
    kept = table.copy()
    np.put_along_axis(kept, lowest, False, axis=1)
    return kept


def _select(table: npt.NDArray[np.bool_], dense: npt.NDArray[np.float32]) -> Cell:
    """The two best edges of every node with the op that is left on them (rules 2 and 3)."""
    final = _drop(table, dense, int(table[0].sum()) - 1, none_first=True)
    scores = dense.copy()
    scores[:, _NONE] = 0
    best = scores.max(axis=1)
    cell: Cell = []
    for node in range(num_nodes(len(table))):
        into = node_edges(node)
        order = np.argsort(best[into.start : into.stop], kind="stable")
        for source in sorted(order[-2:].tolist()):
            cell.append((PRIMITIVES[int(final[into[source]].argmax())], source))
    return cell


def _genotype(normal: Cell, reduce: Cell) -> Genotype:
    concat = list(range(NUM_INPUTS, NUM_INPUTS + len(normal) // 2))
    return Genotype(normal, concat, reduce, list(concat))


def _size(stage: Mapping[str, npt.NDArray[np.float32]]) -> str:
    return " by ".join(str(length) for length in stage["normal"].shape)
