"""Static tables of a whole pass: which calls run as one, and where the coefficients of a cell lie.

Edges leave both inputs at the same size, so what leaves states 0 and 1 is one call. Scales and
shifts of the forward pass, float32 ``[places, C]``, lie where kernels read them in a row: the two
inputs, the second halves of every call, everything that enters every node. Coefficients of the
backward pass, ``[2 alphas + 2, 3, C]``: of what enters a node by alpha, then of first halves by
alpha, then of the two inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from .. import calls as cell_calls
from .. import plan as plans
from ..calls import Call, Item
from ..plan import Plan
from .weight_tasks import Product, product

# Rows of a table on the device, padded to 16 columns there.
Rows = list[list[int]]


@dataclass(frozen=True)
class Span:
    """Rows ``begin`` to ``end`` of the scales."""

    begin: int
    end: int


def _alpha(call: Call, item: Item) -> int:
    return item.edge * call.num_ops + item.op


class CellTables:
    """The tables of a plan.

    Attributes:
        calls: The calls one by one.
        sources: States whose edges run together, in order.
        leave, second: As in ``CellCalls``, by ``sources``.
        inputs: Both preprocessing calls as one, for what is done for both at once.
        second_spans, node_spans: Where their scales lie, by ``sources`` and by node.
        places: How many scales there are.
        first_place: Slot of the first second half's input in ``Saved.slots``.
        first_kept: First state whose relu is kept in ``Saved.slots``, which a reduction cell's
            inputs are too large for.
        num_kept: Arrays behind the slots: inputs of second halves, then relu of states.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.calls = cell_calls.of(plan.key)
        self.alphas = sum(range(2, 2 + plan.steps)) * plan.num_ops
        self.sources = [(0, 1), *((source,) for source in range(2, plan.steps + 1))]
        self.leave = [self.together(self.calls.leave, sources) for sources in self.sources]
        self.second = [self.together(self.calls.second, sources) for sources in self.sources]
        self.inputs = self.together(self.calls.inputs, (0, 1))
        self.first_place = plan.num_slots
        self.first_kept = 2 if plan.reduction else 0
        self.num_kept = self.calls.num_halves + plan.steps + 1 - self.first_kept
        self.second_spans: list[Span] = []
        self.node_spans: list[Span] = []
        end = 2
        for spans, wanted in (
            (self.second_spans, self.second),
            (self.node_spans, self.calls.both),
        ):
            for call in wanted:
                spans.append(Span(end, end + len(call.items)))
                end += len(call.items)
        self.places = end
        self._gathers: dict[tuple[int, ...], Call] = {}
        self._made: dict[Call, tuple[Product, ...]] = {}

    def together(self, calls: tuple[Call, ...], which: tuple[int, ...]) -> Call:
        """Several calls as one."""
        if len(which) == 1:
            return calls[which[0]]
        items = tuple(item for one in which for item in calls[one].items)
        return Call(items, self.plan.num_ops)

    def gather(self, sources: tuple[int, ...]) -> Call:
        """Everything on the edges that leave some states."""
        if sources not in self._gathers:
            self._gathers[sources] = self.together(self.calls.gather, sources)
        return self._gathers[sources]

    def input_row(self, which: int, training: bool) -> int:
        """Row of an input in ``Saved.norms``."""
        return (self.plan.num_slots if training else len(self.plan.norms) - 2) + which

    def norm_rows(self, call: Call, training: bool) -> tuple[int, ...]:
        """Rows of a call's items in ``Saved.norms``; 0 for skips, which read none."""
        rows = (item.slot if training else item.norm for item in call.items)
        return tuple(max(row, 0) for row in rows)

    def kept(self, call: Call) -> tuple[int, ...]:
        """Where the rectified inputs of a call's second halves are kept, in ``Saved.slots``."""
        return tuple(self.first_place + item.half for item in call.items)

    def kept_state(self, source: int) -> int:
        """Where relu of a state is kept, in ``Saved.slots``; of a larger one its number."""
        if source < self.first_kept:
            return source
        return self.first_place + self.calls.num_halves + source - self.first_kept

    def kept_states(self, call: Call) -> tuple[int, ...]:
        """That of the state that each of a call's items leaves."""
        return tuple(self.kept_state(item.source) for item in call.items)

    def coefficient_rows(self, call: Call, first: bool) -> tuple[int, ...]:
        """Rows of a call's items; ``first``: of what leaves a state, where a half is the first."""
        halves = [first and item.half >= 0 for item in call.items]
        return tuple(
            _alpha(call, item) + self.alphas * half
            for item, half in zip(call.items, halves, strict=True)
        )

    def _readers(self, training: bool) -> dict[int, Rows]:
        """Alpha and place of everything that reads a norm, by its row; -1 holds the skips."""
        found: dict[int, Rows] = {}
        for which in (0, 1):
            found.setdefault(self.input_row(which, training), []).append([-1, which])
        for call, span in zip(self.second, self.second_spans, strict=True):
            for place, item in enumerate(call.items, span.begin):
                row = item.input if training else item.input_norm
                found.setdefault(row, []).append([-1, place])
        for call, span in zip(self.calls.both, self.node_spans, strict=True):
            for place, item in enumerate(call.items, span.begin):
                row = item.slot if training else item.norm
                found.setdefault(row, []).append([_alpha(call, item), place])
        return found

    @cached_property
    def _by_slot(self) -> dict[int, Rows]:
        return self._readers(True)

    def _fold_rows(self, rows: list[int], skips: bool, readers: dict[int, Rows]) -> Rows:
        """Rows of ``fold.fold_norms``: one a norm, one for each skip, then their readers."""
        wanted = [(row, readers.get(row, [])) for row in rows]
        wanted += [(-1, [reader]) for reader in readers.get(-1, []) if skips]
        heads: Rows = []
        tail: Rows = []
        for row, found in wanted:
            begin = len(wanted) + len(tail)
            heads.append([row, begin, begin + len(found)])
            tail += found
        return heads + tail

    def input_fold(self) -> tuple[int, Rows]:
        """Both inputs and all skips, in training: programs, table."""
        rows = [self.input_row(which, True) for which in (0, 1)]
        return 2 + len(self._by_slot.get(-1, [])), self._fold_rows(rows, True, self._by_slot)

    def call_fold(self, call: Call) -> Rows:
        """The items of a call, in training."""
        return self._fold_rows([item.slot for item in call.items], False, self._by_slot)

    def evaluation_fold(self) -> tuple[int, Rows]:
        """All norms and skips in evaluation: programs, table."""
        readers = self._readers(False)
        rows = list(range(len(self.plan.norms)))
        return len(rows) + len(readers.get(-1, [])), self._fold_rows(rows, True, readers)

    def node_coefficients(self, node: int, training: bool) -> Rows:
        """Rows of ``coefficients`` of everything that enters a node."""
        call = self.calls.both[node]
        found: Rows = []
        for i, (item, row) in enumerate(
            zip(call.items, self.norm_rows(call, training), strict=True)
        ):
            alpha = _alpha(call, item)
            norm = -1 if item.kind == plans.SKIP else row
            found.append([0, 1 + i, norm, alpha, alpha, alpha])
        return found

    def half_coefficients(self, call: Call, training: bool) -> Rows:
        """Rows of ``coefficients`` of the first halves behind a call's second ones."""
        rows = self.half_norms(call, training)
        return [
            [2 * i, 2 * i + 1, rows[i], -1, self.alphas + _alpha(call, item), -1]
            for i, item in enumerate(call.items)
        ]

    def half_norms(self, call: Call, training: bool) -> list[int]:
        """Rows in ``Saved.norms`` of what a call's second halves read."""
        return [item.input if training else item.input_norm for item in call.items]

    def input_coefficients(self, sources: tuple[int, ...], training: bool) -> Rows:
        """Rows of ``coefficients`` of some inputs."""
        return [
            [2 * i, 2 * i + 1, self.input_row(which, training), -1, 2 * self.alphas + which, -1]
            for i, which in enumerate(sources)
        ]

    @cached_property
    def _readers_of(self) -> tuple[Call, Call]:
        """Convolutions that read arrays of a node's size, and those that read larger ones."""
        second = [item for call in self.second for item in call.items]
        first = [i for call in self.calls.gather for i in call.items if i.pointwise >= 0]
        large = [item for item in first if item.stride == 2]
        small = second + [item for item in first if item.stride == 1]
        return Call(tuple(small), self.plan.num_ops), Call(tuple(large), self.plan.num_ops)

    @cached_property
    def weighted(self) -> Call:
        """Everything with weights: of edges, then the preprocessing of both inputs."""
        small, large = self._readers_of
        return Call((*small.items, *large.items, *self.inputs.items), self.plan.num_ops)

    def products(self, offsets: list[int]) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
        """What ``weight_gradient`` wants to know of convolutions that read arrays of a node's size
        and of those that read larger ones.

        They read what is kept, or larger states by number.
        """
        small, large = (self._products(call, offsets) for call in self._readers_of)
        return small, large

    def _products(self, call: Call, offsets: list[int]) -> tuple[Product, ...]:
        if call not in self._made:
            rows = self.coefficient_rows(call, first=True)
            found = []
            for item, row in zip(call.items, rows, strict=True):
                if item.input >= 0:
                    place, number = self.first_place + item.half, _alpha(call, item)
                else:
                    place, number = self.kept_state(item.source), row
                found.append(product(item, number, place, offsets))
            self._made[call] = tuple(found)
        return self._made[call]

    def input_products(self, which: int, offsets: list[int]) -> tuple[Product, ...]:
        """That of the preprocessing of an input, whose gradient is the half of that number."""
        item = self.calls.inputs[which].items[0]
        return (replace(product(item, 2 * self.alphas + which, 0, offsets), half=which),)


@lru_cache(maxsize=1024)
def of(key: str) -> CellTables:
    """The tables of the plan ``key``, made once."""
    return CellTables(plans.from_key(key))
