"""Perturbation-based selection: what removing an operation costs in accuracy decides.

Plain parts of it: the weights of a partly discretised supernet, the order of decisions and the
cell they end in. `pdarts_fast.selection` runs it.

Source: DARTS-PT (arXiv 2108.04392), section 4; skip cap, ties and rates are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pdarts_fast.data.plan import keyed_generator
from pdarts_fast.errors import RunError
from pdarts_fast.genotype import Cell, Genotype, count_skips
from pdarts_fast.search_space import (
    CELL_TYPES,
    NUM_INPUTS,
    NUM_NODES,
    Switches,
    edges,
    live_names,
    node_edges,
)

OPERATION, EDGES = "operation", "edges"
NO_OPERATION = "none"
SKIP = "skip_connect"


@dataclass(frozen=True)
class Score:
    """The supernet without one operation or edge, on the validation images.

    Attributes:
        accuracy: 0 to 1; the lower, the more the missing part is worth.
        loss: Mean cross-entropy in nats; breaks ties of the accuracy.
    """

    accuracy: float
    loss: float

    @property
    def worth(self) -> tuple[float, float]:
        """Sorts parts by what they are worth, the most valuable last."""
        return -self.accuracy, self.loss


@dataclass(frozen=True)
class Question:
    """One decision to take.

    Attributes:
        kind: ``operation`` of an edge, or ``edges`` of a node.
        cell: ``normal`` or ``reduce``.
        place: The edge, or the node.
    """

    kind: str
    cell: str
    place: int


@dataclass(frozen=True)
class Decision:
    """A question that was answered.

    Attributes:
        question: As asked.
        scores: Of the supernet without each candidate: names of operations, or edge numbers.
        chosen: The operation, or the two edges that stay (as text).
    """

    question: Question
    scores: dict[str, Score]
    chosen: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Decision:
        """The decision that ``to_json`` wrote."""
        scores = {name: Score(**score) for name, score in values["scores"].items()}
        return cls(Question(**values["question"]), scores, list(values["chosen"]))


def rounds(seed: int) -> list[list[Question]]:
    """The questions in order; those of one round are answered without tuning between them.

    A round asks for one edge (later one node) of either cell type, each in a random order of its
    own. The first node has no more edges than it keeps, so nobody asks for it.

    Args:
        seed: The run's seed.
    """
    orders = {
        (kind, cell): keyed_generator(seed, "select", kind, cell).permutation(count)
        for cell in CELL_TYPES
        for kind, count in ((OPERATION, len(edges())), (EDGES, NUM_NODES - 1))
    }
    asked = [
        [Question(OPERATION, cell, int(orders[OPERATION, cell][i])) for cell in CELL_TYPES]
        for i in range(len(edges()))
    ]
    asked += [
        [Question(EDGES, cell, 1 + int(orders[EDGES, cell][i])) for cell in CELL_TYPES]
        for i in range(NUM_NODES - 1)
    ]
    return asked


class PartlyDiscrete(nn.Module):
    """Weights in which some edges have a single operation, and single parts can be taken out.

    ``keep * inner(alphas) + fixed``: nothing is renormalised.

    Args:
        switches: Live primitives, bool [14, 8] per cell type.
        inner: What turns alphas into weights; None for a softmax.
    """

    def __init__(
        self, switches: Switches, inner: Callable[[str, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self._inner = inner
        self.names = {cell: live_names(switches[cell]) for cell in CELL_TYPES}
        for cell in CELL_TYPES:
            shape = (len(switches[cell]), int(switches[cell][0].sum()))
            self.register_buffer(f"keep_{cell}", torch.ones(shape), persistent=False)
            self.register_buffer(f"fixed_{cell}", torch.zeros(shape), persistent=False)

    def forward(self, cell: str, alphas: Tensor) -> Tensor:
        """Weights [edges, k] from alphas [edges, k]."""
        weights = alphas.softmax(dim=-1) if self._inner is None else self._inner(cell, alphas)
        keep, fixed = self._tables(cell)
        return keep * weights + fixed

    def carry_out(self, decision: Decision) -> None:
        """Carry out a decision, in place."""
        question = decision.question
        keep, fixed = self._tables(question.cell)
        if question.kind == OPERATION:
            keep[question.place] = 0
            fixed[question.place] = 0
            fixed[question.place, self._column(question, decision.chosen[0])] = 1
            return
        for edge in node_edges(question.place):
            if str(edge) not in decision.chosen:
                keep[edge] = 0
                fixed[edge] = 0

    def candidates(self, question: Question) -> list[str]:
        """What can be taken out to answer a question; ``none`` is no answer."""
        if question.kind == EDGES:
            return [str(edge) for edge in node_edges(question.place)]
        names = self.names[question.cell][question.place]
        return [name for name in names if name != NO_OPERATION]

    def remove(self, question: Question, candidate: str) -> Callable[[], None]:
        """Take a candidate out, in place; returns what puts it back."""
        tables = self._tables(question.cell)
        if question.kind == EDGES:
            index: Any = int(candidate)
        else:
            index = (question.place, self._column(question, candidate))
        before = [table[index].clone() for table in tables]
        for table in tables:
            table[index] = 0

        def put_back() -> None:
            for table, value in zip(tables, before, strict=True):
                table[index] = value

        return put_back

    def _tables(self, cell: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"keep_{cell}"), getattr(self, f"fixed_{cell}")

    def _column(self, question: Question, name: str) -> int:
        return self.names[question.cell][question.place].index(name)


def decide(question: Question, scores: dict[str, Score]) -> Decision:
    """The operation, or the two edges, without which the supernet is worst."""
    ranked = sorted(scores, key=lambda name: scores[name].worth, reverse=True)
    if question.kind == OPERATION:
        return Decision(question, scores, ranked[:1])
    return Decision(question, scores, sorted(ranked[:NUM_INPUTS], key=int))


def cell_of(decisions: Sequence[Decision]) -> Genotype:
    """The genotype of all decisions, before any skip cap."""
    chosen = {(d.question.cell, d.question.kind, d.question.place): d.chosen for d in decisions}
    cells: dict[str, Cell] = {}
    for cell in CELL_TYPES:
        cells[cell] = []
        for node in range(NUM_NODES):
            into = node_edges(node)
            kept = [int(edge) for edge in chosen.get((cell, EDGES, node), into)]
            for edge in kept:
                cells[cell].append((chosen[cell, OPERATION, edge][0], edge - into.start))
    concat = list(range(NUM_INPUTS, NUM_INPUTS + NUM_NODES))
    return Genotype(cells["normal"], concat, cells["reduce"], list(concat))


def cap_skips(
    genotype: Genotype, decisions: Sequence[Decision], max_skips: int
) -> tuple[Genotype, list[dict[str, Any]]]:
    """Replace skips of the normal cell that are too many by the second best of their edge.

    The one whose edge lost least more than without the second best goes first.

    Args:
        genotype: What the decisions say.
        decisions: All of them.
        max_skips: Skips allowed in the normal cell.

    Returns:
        The genotype, and one entry a replacement.

    Raises:
        RunError: No edge with a skip has another operation left.
    """
    scores = {
        d.question.place: d.scores
        for d in decisions
        if d.question.kind == OPERATION and d.question.cell == "normal"
    }
    normal = list(genotype.normal)
    swaps = []
    while count_skips(normal) > max_skips:
        options = []
        for place, (op, source) in enumerate(normal):
            of_edge = scores[node_edges(place // 2)[source]]
            others = [name for name in of_edge if name != SKIP]
            if op != SKIP or not others:
                continue
            second = max(others, key=lambda name: of_edge[name].worth)
            margin = np.subtract(of_edge[SKIP].worth, of_edge[second].worth)
            options.append((tuple(margin.tolist()), place, second))
        if not options:
            raise RunError(
                f"--max-skips {max_skips} cannot be reached with the ops of the last stage"
            )
        _, place, second = min(options)
        normal[place] = (second, normal[place][1])
        swaps.append(
            {
                "cell": "normal",
                "node": place // 2,
                "source": normal[place][1],
                "before": SKIP,
                "after": second,
            }
        )
    return genotype._replace(normal=normal), swaps
