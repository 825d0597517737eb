"""Whole passes of a cell: the kernels of the primitives with the algebra between them in kernels.

The order of the steps is that of ``cell_forward`` and ``cell_backward``. What those compute in
torch between two primitives is a launch of ``fold`` or ``coefficients`` here; what leaves both
inputs runs together, and so do all weight gradients, at the end. What convolutions read, relu of
states and rectified inputs of second halves, is kept behind the slots for the weight gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls import Call
from ..cell_pass import Saved
from ..interface import Arrays
from ..plan import Plan
from ..weights import Layout
from . import affine, cell_tables, common, fan_out, mix, preprocess, reduce
from .cell_tables import CellTables, Rows
from .coefficients import Entering, coefficients
from .fan_in import gather
from .fold import Norms, fold_norms, given_norms
from .gradient_rows import device_table
from .mid_backward import half_gradients
from .pointwise_backward import Side, pointwise_backward
from .running import move_running
from .weight_gradient import Reads, contract, weight_products
from .weight_tasks import INPUT, LARGE, STACK, Division, make_division, make_task
from .weights import room


class Steps:
    """Kernels of a pass, each called with a call and its arrays, which ``record.py`` notes."""

    def preprocess(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        preprocess.one_by_one(call, arrays, *rest, pack=True)

    def fold(
        self, call: Call, arrays: Arrays, partials: Tensor, norms: Norms, table: Tensor, count: int
    ) -> None:
        fold_norms(partials, norms, table, count)

    def given(self, call: Call, arrays: Arrays, norms: Norms, table: Tensor, count: int) -> None:
        given_norms(norms, table, count)

    def affine(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        affine.both_affine_(arrays.states[0], arrays.states[1], *rest)

    def leave(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        fan_out.leaving(call, arrays, *rest)

    def second_halves(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        fan_out.second_halves(call, arrays, *rest)

    def mix(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        mix.mix(call, arrays, *rest)

    def reduce(self, call: Call, arrays: Arrays, *rest: Any) -> Tensor:
        return reduce.partial_sums(call, arrays, *rest)

    def coefficients(self, call: Call, arrays: Arrays, *rest: Any, **options: Any) -> None:
        coefficients(*rest, **options)

    def half_gradients(self, call: Call, arrays: Arrays, *rest: Any) -> Tensor:
        return half_gradients(call, arrays, *rest)

    def gather(self, call: Call, arrays: Arrays, *rest: Any, **options: Any) -> Tensor | None:
        return gather(call, arrays, *rest, **options)

    def pointwise_backward(
        self, call: Call, arrays: Arrays, sides: list[Side], coef: Tensor
    ) -> None:
        pointwise_backward(call, sides, coef, None)

    def weight_products(self, call: Call, arrays: Arrays, *rest: Any) -> None:
        weight_products(call, arrays, *rest)

    def contract(self, call: Call, arrays: Arrays, division: Division, partials: Tensor) -> None:
        contract(call, arrays, division, partials)


class TritonCell:
    """``interface.WholeCell`` over the Triton kernels.

    Args:
        steps: Runs the kernels; a recorder gives its own.
    """

    def __init__(self, steps: Steps | None = None) -> None:
        self.steps = steps or Steps()

    def extra_slots(self, plan: Plan) -> int:
        return cell_tables.of(plan.key).num_kept

    def kept_weights(self, where: Layout, parameters: Sequence[Tensor], dtype: torch.dtype) -> int:
        return where.total + room(where.total, dtype)

    def forward(
        self, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor, stats: Tensor
    ) -> None:
        _Forward(self.steps, plan, saved, arrays, alphas).run(stats)

    def backward(
        self,
        plan: Plan,
        saved: Saved,
        arrays: Arrays,
        alphas: Tensor,
        grad: Tensor,
        want_inputs: tuple[bool, bool],
    ) -> tuple[list[Tensor | None], Tensor]:
        backward = _Backward(self.steps, plan, saved, arrays, alphas)
        return backward.run(grad, want_inputs), backward.grad_alphas

    def move_running(
        self,
        plan: Plan,
        running: list[Tensor],
        batches: list[Tensor],
        stats: Tensor,
        counts: list[int],
    ) -> bool:
        return move_running(plan, running, batches, stats, counts)


class _Pass:
    """What both passes share."""

    def __init__(
        self, steps: Steps, plan: Plan, saved: Saved, arrays: Arrays, alphas: Tensor
    ) -> None:
        common.check_storage(saved.slots)
        for array in saved.inputs:
            common.check_size(array)
        self.steps, self.plan, self.saved, self.arrays = steps, plan, saved, arrays
        self.tables: CellTables = cell_tables.of(plan.key)
        self.calls = self.tables.calls
        if len(saved.slots) != plan.num_slots + self.tables.num_kept:
            raise ValueError("the arrays of this cell are not those of a whole forward pass")
        self.alphas = alphas.detach().float().flatten()
        self.channels, self.training = saved.slots.shape[-1], arrays.training

    def table(self, call: Call, name: str, make: Any) -> Tensor:
        """Rows on the device, made once a call."""
        return device_table(call, (name, self.training), self.saved.slots.device, make)

    def input_arrays(self, which: int) -> Arrays:
        """Those of preprocessing, whose only slot is the state."""
        arrays, y = self.arrays, self.saved.states[which][None]
        return Arrays(
            y, arrays.states, arrays.weights, arrays.rate, arrays.state, arrays.channels,
            arrays.training, [],
        )  # fmt: skip


class _Forward(_Pass):
    def run(self, stats: Tensor) -> None:
        room = stats.new_empty(2, self.tables.places, self.channels, dtype=torch.float32)
        self.norms = Norms(stats, self.saved.norms, self.alphas, room[0], room[1])
        if not self.training:
            count, rows = self.tables.evaluation_fold()
            table = self.table(self.tables.inputs, "evaluation", lambda: rows)
            self.steps.given(self.tables.inputs, self.arrays, self.norms, table, count)
        self._preprocess()
        for number, sources in enumerate(self.tables.sources):
            self._leave(number, sources)
            if sources[-1] <= self.plan.steps:
                self._mix(sources[-1] - 1)

    def _preprocess(self) -> None:
        tables = self.tables
        partials = fan_out.empty_partials(tables.inputs, self.saved.states[0][None])
        arrays, states = self.input_arrays(0), self.saved.states
        outputs = (states[0][None], states[1][None])
        self.steps.preprocess(tables.inputs, arrays, self.saved.inputs, partials, outputs)
        if self.training:
            count, rows = tables.input_fold()
            table = self.table(tables.inputs, "fold", lambda: rows)
            self.steps.fold(tables.inputs, arrays, partials, self.norms, table, count)
        scales, shifts = self.norms.scales[:2], self.norms.shifts[:2]
        kept = None if tables.first_kept else self.saved.slots[tables.kept_state(0) :][:2]
        self.steps.affine(tables.inputs, arrays, scales, shifts, kept)

    def _leave(self, number: int, sources: tuple[int, ...]) -> None:
        """Everything on the edges that leave some states, up to the last BatchNorm."""
        tables, states = self.tables, self.arrays.states
        first, second = tables.leave[number], tables.second[number]
        x, other = states[sources[0]], states[sources[-1]]
        if first.items:
            partials = fan_out.empty_partials(first, self.saved.slots)
            kept, slots = tables.kept_states(first), self.saved.slots
            self.steps.leave(first, self.arrays, x, partials, other, kept, slots)
            self._fold(first, partials)
        if second.items:
            partials = fan_out.empty_partials(second, self.saved.slots)
            span, slots = tables.second_spans[number], self.saved.slots
            scale = self.norms.scales[span.begin : span.end]
            shift = self.norms.shifts[span.begin : span.end]
            kept = tables.kept(second)
            self.steps.second_halves(second, self.arrays, scale, shift, partials, kept, slots)
            self._fold(second, partials)

    def _fold(self, call: Call, partials: Tensor) -> None:
        if self.training:
            table = self.table(call, "fold", lambda: self.tables.call_fold(call))
            count = len(call.items)
            self.steps.fold(call, self.arrays, partials, self.norms, table, count)

    def _mix(self, node: int) -> None:
        span = self.tables.node_spans[node]
        scale = self.norms.scales[span.begin : span.end]
        shift = self.norms.shifts[span.begin : span.end]
        out, state = self.arrays.states[node + 2], node + 2
        is_left = state <= self.plan.steps
        kept = self.saved.slots[self.tables.kept_state(state)] if is_left else None
        self.steps.mix(self.calls.both[node], self.arrays, scale, shift, out, kept)


class _Backward(_Pass):
    def run(self, grad: Tensor, want_inputs: tuple[bool, bool]) -> list[Tensor | None]:
        arrays, slots, steps = self.arrays, self.saved.slots, self.plan.steps
        self.want_weights = arrays.weights.grad is not None
        self.wanted = [want or self.want_weights for want in want_inputs]
        self.grad_alphas = self.alphas.new_zeros(self.alphas.shape)
        rows = 2 * self.tables.alphas + 2
        self.coef = self.alphas.new_empty(rows, 3, self.channels)
        arrays.half_grads = slots.new_empty(self.calls.num_halves, *slots.shape[1:])
        arrays.grads = list(grad.chunk(steps, dim=-1))
        self.large: Tensor | None = None
        if self.want_weights and self.plan.reduction:
            state = self.saved.states[0]
            self.large = state.new_empty(2, *state.shape)
        for node in reversed(range(steps)):
            self._enter(node)
            if node > 0:
                out = slots.new_empty(1, *slots.shape[1:])
                incoming = arrays.grads[node - 1]
                self._gather((node + 1,), incoming, out)
                arrays.grads[node - 1] = out[0]
        sources = tuple(which for which in (0, 1) if self.wanted[which])
        inputs: list[Tensor | None] = [None, None]
        if sources:
            grads = self._states(sources)
            inputs = self._preprocess(want_inputs, dict(zip(sources, grads, strict=True)))
            if self.want_weights:
                self._weights(grads)
        return inputs

    def _coefficients(
        self, call: Call, name: str, rows: Any, partials: Tensor, pixels: int, stored: bool
    ) -> None:
        table = self.table(call, name, rows)
        self.steps.coefficients(
            call, self.arrays, partials, self.saved.norms, self.alphas, self.coef,
            self.grad_alphas, table, pixels, training=self.training, stored=stored,
        )  # fmt: skip

    def _enter(self, node: int) -> None:
        """Alpha gradients of a node's edges, and dy of everything that enters it."""
        call, tables, norms = self.calls.both[node], self.tables, self.saved.norms
        if not call.items:
            return
        rows = tables.norm_rows(call, self.training)
        partials = self.steps.reduce(
            call, self.arrays, self.arrays.grads[node], norms[:, 0], norms[:, 1], rows
        )
        pixels = self.saved.slots[0, ..., 0].numel()

        def of_node() -> Rows:
            return tables.node_coefficients(node, self.training)

        wanted = self.wanted[0] + 2 * self.wanted[1]
        second = self.calls.enter_second[wanted][node]
        if not second.items:
            self._coefficients(call, "coefficients", of_node, partials, pixels, False)
            return
        table = self.table(call, "coefficients", of_node)
        enter = Entering(
            partials, norms, self.alphas, self.grad_alphas, table, training=self.training
        )
        partials = self.steps.half_gradients(
            second, self.arrays, norms, tuple(tables.half_norms(second, self.training)), self.coef,
            tuple(call.items.index(item) for item in second.items), enter,
        )  # fmt: skip

        def of_halves() -> Rows:
            return tables.half_coefficients(second, self.training)

        self._coefficients(second, "coefficients", of_halves, partials, pixels, False)

    def _gather(
        self, sources: tuple[int, ...], incoming: Tensor | None, out: Tensor
    ) -> Tensor | None:
        """Gradients of some states from all edges that leave them."""
        call = self.tables.gather(sources)
        states = {source: self.arrays.states[source] for source in sources}
        numbers = self.tables.coefficient_rows(call, first=True)
        # What the forward pass has not kept.
        room = self.large if sources[0] < 2 else None
        return self.steps.gather(
            call, self.arrays, states, self.coef, incoming, out, room, numbers,
            sums=incoming is None,
        )  # fmt: skip

    def _states(self, sources: tuple[int, ...]) -> Tensor:
        """Gradients of the preprocessed inputs, and dy of preprocessing."""
        state = self.saved.states[sources[0]]
        out = state.new_empty(len(sources), *state.shape)
        partials = self._gather(sources, None, out)
        assert partials is not None
        call = self.tables.gather(sources)

        def rows() -> Rows:
            return self.tables.input_coefficients(sources, self.training)

        self._coefficients(call, "inputs", rows, partials, state[..., 0].numel(), True)
        return out

    def _preprocess(
        self, wanted: tuple[bool, bool], state_grads: dict[int, Tensor]
    ) -> list[Tensor | None]:
        """Gradients of the cell's inputs from those of the states made of them."""
        found: list[Tensor | None] = [None, None]
        sides = []
        for which in (0, 1):
            if wanted[which]:
                x, arrays = self.saved.inputs[which], self.input_arrays(which)
                arrays.grads = [state_grads[which]]
                found[which] = out = torch.empty_like(x)
                sides.append(Side(self.calls.inputs[which], arrays, x, out))
        if sides:
            call = self.tables.inputs if len(sides) == 2 else sides[0].call
            first = 2 * self.tables.alphas + sides[0].call.items[0].source
            coef = self.coef[first : first + len(sides)]
            self.steps.pointwise_backward(call, sides[0].arrays, sides, coef)
        return found

    def _weights(self, state_grads: Tensor) -> None:
        """All weight gradients: partial sums in one launch, one that adds them up."""
        tables, arrays, saved = self.tables, self.arrays, self.saved
        offsets, slots = arrays.weights.layout.offsets, saved.slots
        large = slots if self.large is None else self.large
        tasks = [
            make_task(arrays, products, stack, rectified=True, source=source)
            for products, stack, source in zip(
                tables.products(offsets), (slots, large), (STACK, LARGE), strict=True
            )
            if products
        ]
        tasks += [
            make_task(
                arrays, tables.input_products(which, offsets), saved.inputs[which][None],
                rectified=False, source=INPUT + which, size=saved.states[which].shape[1:3],
            )
            for which in (0, 1)
        ]  # fmt: skip
        division = make_division(arrays, tuple(tasks))
        partials = self.coef.new_empty(division.vectors, self.channels)
        reads = Reads(slots, large, saved.inputs, saved.states, state_grads)
        call = tables.weighted
        self.steps.weight_products(call, arrays, division, reads, self.coef, partials)
        self.steps.contract(call, arrays, division, partials)
