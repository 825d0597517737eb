"""Brings a derived cell under its targets by swapping operations, and says whether that can be.

Source: ours; docs/strategies.md has the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdarts_fast import search_space
from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES, Genotype
from pdarts_fast.search_space import CELL_TYPES, Alphas, edge_index, node_edges
from pdarts_fast.strategies.costs import NONE, CostTable
from pdarts_fast.strategies.targets import Target, show

SKIP = PRIMITIVES.index("skip_connect")
LogProbabilities = Mapping[str, npt.NDArray[np.float64]]

# A swap must lower the violation by more than rounding does.
_LEAST_SAVING = 1e-12


@dataclass(frozen=True)
class Swap:
    """One operation that a repair replaced.

    Attributes:
        cell: ``normal`` or ``reduce``.
        node: Node that the operation enters.
        source: State that it reads.
        before: Operation that the alphas chose.
        after: Operation in its place.
        loss: Log-probability lost.
    """

    cell: str
    node: int
    source: int
    before: str
    after: str
    loss: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def log_probabilities(finished: Sequence[Alphas]) -> dict[str, npt.NDArray[np.float64]]:
    """Log-probability of every primitive on every edge over all stages, [14, 8] per cell type.

    A primitive dropped at the end of a stage keeps its probability of that stage times that of
    the stages before to keep what they kept; so the 8 of an edge add up to 1.

    Args:
        finished: Alphas at the end of each stage.
    """
    derivation = search_space.derive(finished)
    alive_in = [search_space.all_switches(), *derivation.switches[:-1]]
    result = {}
    for kind in CELL_TYPES:
        table = np.zeros(alive_in[0][kind].shape)
        kept = np.zeros(len(table))
        for number, (switches, stage) in enumerate(zip(alive_in, finished, strict=True)):
            alive = switches[kind]
            values = np.asarray(stage[kind], dtype=np.float64)
            shifted = values - values.max(axis=1, keepdims=True)
            logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            table[alive] = (logs + kept[:, None]).ravel()
            if number + 1 < len(alive_in):
                survivors = np.where(alive_in[number + 1][kind], np.exp(table), 0)
                kept = np.log(survivors.sum(axis=1))
        result[kind] = table
    return result


class Repair:
    """The choice of operations on the kept edges of one genotype.

    Args:
        genotype: What the alphas chose; its edges stay.
        tables: Costs, one a target.
        targets: In the same order.
        max_skips: Skips allowed in the normal cell.
    """

    def __init__(
        self,
        genotype: Genotype,
        tables: Sequence[CostTable],
        targets: Sequence[Target],
        max_skips: int,
    ) -> None:
        self._genotype = genotype
        self._max_skips = max_skips
        self._slots = [
            (kind, edge_index(pair // 2, source))
            for kind in CELL_TYPES
            for pair, (_, source) in enumerate(getattr(genotype, kind))
        ]
        self._limits = np.array([target.limit for target in targets])
        self._fixed = np.array([table.fixed for table in tables])
        # [slots, 8, resources]
        self._costs = np.array(
            [[table.ops[kind][edge] for table in tables] for kind, edge in self._slots]
        ).transpose(0, 2, 1)
        self.choice = [
            PRIMITIVES.index(op) for kind in CELL_TYPES for op, _ in getattr(genotype, kind)
        ]

    def violation(self, choice: Sequence[int]) -> float:
        """Sum over targets of how far, in units of the target, a choice exceeds it."""
        cost = self._fixed
        # In the order of `CostTable.of`, so that the two agree to the last bit.
        for slot, op in enumerate(choice):
            cost = cost + self._costs[slot, op]
        return float((np.maximum(cost - self._limits, 0) / self._limits).sum())

    def cheapest(self) -> list[int]:
        """The choice of the least sum of costs in units of the targets, within the skip cap."""
        total = (self._costs / self._limits).sum(axis=2)
        total[:, NONE] = np.inf
        others = total.copy()
        others[:, SKIP] = np.inf
        choice = [int(op) for op in others.argmin(axis=1)]
        saved = others.min(axis=1) - total[:, SKIP]
        capped = [slot for slot, (kind, _) in enumerate(self._slots) if kind == "normal"]
        best = sorted(capped, key=lambda slot: -saved[slot])[: self._max_skips]
        for slot in range(len(choice)):
            if saved[slot] > 0 and (slot not in capped or slot in best):
                choice[slot] = SKIP
        return choice

    def run(self, logs: LogProbabilities) -> tuple[Genotype, list[Swap]]:
        """Swap until no target is exceeded.

        Each swap is the one that loses least log-probability per unit of violation it takes away.
        If none takes any away (several targets can pull apart), the cheapest choice is taken and
        as much as possible put back.

        Args:
            logs: Of every primitive on every edge.

        Raises:
            UsageError: Not even the cheapest choice meets the targets.
        """
        scores = np.array([logs[kind][edge] for kind, edge in self._slots])
        first = list(self.choice)
        while (now := self.violation(self.choice)) > 0:
            swap = self._best_swap(scores, now)
            if swap is None:
                self._from_the_cheapest(scores)
                break
            self.choice[swap[0]] = swap[1]
        return self._result(), self._swaps(first, scores)

    def _best_swap(self, scores: npt.NDArray[np.float64], now: float) -> tuple[int, int] | None:
        best: tuple[float, int, int] | None = None
        for slot, old in enumerate(self.choice):
            for op in range(len(PRIMITIVES)):
                if op in (NONE, old) or not self._allowed(slot, op):
                    continue
                saved = now - self.violation([*self.choice[:slot], op, *self.choice[slot + 1 :]])
                if saved <= _LEAST_SAVING:
                    continue
                rate = float(scores[slot, old] - scores[slot, op]) / saved
                if best is None or rate < best[0]:
                    best = (rate, slot, op)
        return None if best is None else best[1:]

    def _from_the_cheapest(self, scores: npt.NDArray[np.float64]) -> None:
        wanted, self.choice = self.choice, self.cheapest()
        if self.violation(self.choice) > 0:
            raise UsageError("--target: not even the cheapest cell meets all targets")
        gains = [
            (float(scores[slot, op] - scores[slot, self.choice[slot]]), slot)
            for slot, op in enumerate(wanted)
        ]
        for _, slot in sorted(gains, key=lambda gain: (-gain[0], gain[1])):
            trial = [*self.choice[:slot], wanted[slot], *self.choice[slot + 1 :]]
            if self._allowed(slot, wanted[slot]) and self.violation(trial) <= 0:
                self.choice = trial

    def _allowed(self, slot: int, op: int) -> bool:
        """Whether an operation in a place keeps to the skip cap."""
        if op != SKIP or self._slots[slot][0] != "normal":
            return True
        others = sum(
            self.choice[other] == SKIP
            for other, (kind, _) in enumerate(self._slots)
            if kind == "normal" and other != slot
        )
        return others < self._max_skips

    def _result(self) -> Genotype:
        names = iter(self.choice)
        cells = {
            kind: [(PRIMITIVES[next(names)], source) for _, source in getattr(self._genotype, kind)]
            for kind in CELL_TYPES
        }
        return self._genotype._replace(normal=cells["normal"], reduce=cells["reduce"])

    def _swaps(self, first: Sequence[int], scores: npt.NDArray[np.float64]) -> list[Swap]:
        swaps = []
        for slot, ((kind, edge), old, new) in enumerate(
            zip(self._slots, first, self.choice, strict=True)
        ):
            if old != new:
                node, source = search_space.edges()[edge]
                loss = float(scores[slot, old] - scores[slot, new])
                swaps.append(Swap(kind, node, source, PRIMITIVES[old], PRIMITIVES[new], loss))
        return swaps


def require_feasible(
    tables: Sequence[CostTable], targets: Sequence[Target], max_skips: int
) -> None:
    """Raise `UsageError` if some cell that a search may end in cannot be brought under its targets.

    Operations can be chosen freely, edges are chosen by the search: both the cell with most and
    the one with fewest edges from its inputs (which have stride 2 in a reduction) must have a
    choice that meets every target.
    """
    picks: list[Callable[[range], list[int]]] = [
        lambda edges: [0, 1],
        lambda edges: [len(edges) - 2, len(edges) - 1],
    ]
    for pick in picks:
        pairs = [("none", source) for node in range(4) for source in pick(node_edges(node))]
        repair = Repair(
            Genotype(pairs, [2, 3, 4, 5], list(pairs), [2, 3, 4, 5]), tables, targets, max_skips
        )
        repair.choice = repair.cheapest()
        if repair.violation(repair.choice) <= 0:
            continue
        cheapest = repair._result()
        costs = [
            (target, table.of(cheapest)) for target, table in zip(targets, tables, strict=True)
        ]
        wrong = [pair for pair in costs if pair[1] > pair[0].limit] or costs
        text = "; ".join(
            f"{target.resource}={show(target.resource, target.limit)} but the cheapest cell needs "
            f"{show(target.resource, cost)}"
            for target, cost in wrong
        )
        raise UsageError(f"--target cannot be met: {text}; give a larger limit")
