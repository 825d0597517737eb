"""All cells of a network in one call of the compiled library; see ``kernels.chain``.

A pass is a table with a row a cell, ``abi.CellTask`` as int64 numbers. What follows from sizes
alone is kept from step to step; addresses are filled in for all cells at once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .. import calls as cell_calls
from .. import moments
from .. import plan as plans
from ..cell_pass import state_size
from ..chain import Kept
from ..weights import layout
from . import abi
from .library import Library
from .memory import pool
from .pages import collapse_small_pages
from .tables import (
    addresses_of,
    are_plain,
    drops,
    places,
    places_in_room,
    set_sizes,
    tables,
    unbiased,
)

# Gradients of outputs that are in use at a time: that of a cell and of both of its inputs.
_LIVE = 3

# Backward passes after which it pays to move small objects, which takes a second or two.
_SETTLED = 500


def _field(struct: type[ctypes.Structure], name: str, index: int = 0) -> int:
    """Column of a field in a table of structs, all of whose fields have 64 bits."""
    return getattr(struct, name).offset // 8 + index


class _Table:
    """Rows of structs, with their fields as columns."""

    def __init__(self, struct: type[ctypes.Structure], numbers: np.ndarray) -> None:
        self._struct, self.numbers = struct, numbers

    def set(self, name: str, values: object, index: int = 0) -> None:
        """Writes a field of every row, element ``index`` of one that is an array."""
        self.numbers[:, _field(self._struct, name, index)] = values


class Geometry:
    """Sizes of all arrays of the passes of a chain, and where they lie.

    Args:
        keys: Plans of the cells.
        shape: Of the first input, ``[N, H, W, C]``.
        dtype: Of the arrays.

    Attributes:
        blocks: Elements of the block that every cell keeps.
        outputs: Shape of every cell's output.
        norm_rows: Doubles of all normalisations.
        room: Elements of the room of a cell's backward pass.
        first_state: Elements of room for the largest first state.
        weights: Numbers in all gradients of weights.
        alphas: Numbers in a cell's gradient of alphas.
        passes: Backward passes so far.
    """

    def __init__(self, keys: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.passes = 0
        self._plans = [plans.from_key(key) for key in keys]
        self._itemsize = dtype.itemsize
        self.outputs: list[tuple[int, ...]] = []
        self._held: list[object] = []
        tasks = (abi.CellTask * len(keys))()
        moves = (abi.RunningTask * len(keys))()
        blocks, rooms, firsts = [], [], []
        before = last = shape
        for plan, task, move in zip(self._plans, tasks, moves, strict=True):
            inputs = (before, last)
            states = [
                (shape[0], *state_size(plan, which, *x[1:3]), plan.channels)
                for which, x in enumerate(inputs)
            ]
            divisor = 2 if plan.reduction else 1
            size = tuple(-(-x // divisor) for x in last[1:3])
            node = (shape[0], *size, plan.channels)
            where = layout(plan.key, plan.channels, plan.in_channels)
            table = tables(plan.key, tuple(where.offsets))
            task.calls, task.training = ctypes.addressof(table.struct), 1
            set_sizes(task, node, inputs, states, plan.channels, dtype)
            self._held.append(table)
            # Only the next cells see an output, but for the last one: its nodes lie apart.
            for which, number in enumerate((len(self.outputs) - 2, len(self.outputs) - 1)):
                if number >= 0:
                    task.in_parts[which] = self._plans[number].steps
            task.apart = len(self.outputs) < len(keys) - 1
            stored = sum(place >= 0 for place in places(plan.key))
            of_node = math.prod(node)
            bits = len(drops(plan)) * of_node
            counts = [stored * of_node, -(-bits // (8 * dtype.itemsize)), plan.steps * of_node]
            blocks.append([*map(math.prod, states), *counts])
            halves = cell_calls.of(plan.key).num_halves
            rooms.append([(plan.steps - 1) * of_node, halves * of_node, math.prod(states[1])])
            firsts.append(math.prod(states[0]))
            slots, factors = unbiased(plan.key, of_node // plan.channels, math.prod(last[:3]))
            self._held.append((slots, factors))
            move.norms, move.channels, move.padded = len(plan.norms), plan.channels, plan.channels
            move.slots, move.unbiased = slots.ctypes.data, factors.ctypes.data
            move.momentum = moments.MOMENTUM
            before, last = last, (*node[:3], plan.steps * plan.channels)
            self.outputs.append(last)
        self._tasks, self._moves = (
            np.frombuffer(bytes(structs), dtype=np.int64).reshape(len(keys), -1)
            for structs in (tasks, moves)
        )
        # The last output is a tensor of its own.
        blocks[-1].pop()
        self.blocks = [places_in_room(counts)[1] for counts in blocks]
        self._in_block = self._bytes([places_in_room(counts)[0] for counts in blocks])
        self.room = max(places_in_room(counts)[1] for counts in rooms)
        self._in_room = self._bytes([places_in_room(counts)[0] for counts in rooms])
        _, self.first_state = places_in_room([max(firsts)])
        self.largest = max(map(math.prod, self.outputs))
        norms = [(plan.num_slots + 2) * 2 * plan.channels for plan in self._plans]
        self.norm_rows, self._first_norm = self._doubles(norms)
        _, self._first_weight = self._doubles([len(plan.weights) for plan in self._plans])
        _, self._first_batch = self._doubles([len(plan.norms) for plan in self._plans])
        totals = [layout(plan.key, plan.channels, plan.in_channels).total for plan in self._plans]
        self.weights, first = self._doubles(totals)
        self._first_grad = first // 2  # float32
        self.alphas = self._plans[0].num_edges * self._plans[0].num_ops
        # A byte of bits belongs to one pixel.
        self._has_bits = np.array([plan.channels % 8 == 0 for plan in self._plans])
        self._reduction = np.array([plan.reduction for plan in self._plans])

    def _bytes(self, begins: list[list[int]]) -> list[np.ndarray]:
        """Offset in bytes of every array, by cell; a cell that lacks the last one has 0."""
        most = max(map(len, begins))
        table = np.array([[*row, *[0] * (most - len(row))] for row in begins], dtype=np.int64)
        return list((table * self._itemsize).T)

    @staticmethod
    def _doubles(counts: Sequence[int]) -> tuple[int, np.ndarray]:
        """Sum of counts, and where each begins, in bytes of 64-bit numbers."""
        begins = list(accumulate(counts, initial=0))
        return begins[-1], np.array(begins[:-1], dtype=np.int64) * 8

    def pass_of(self, kept: Kept, alphas: Sequence[Tensor], addresses: np.ndarray) -> _Table:
        """The table of a pass.

        Args:
            kept: Its arrays.
            alphas: float64, of normal and of reduction cells.
            addresses: Of every weight.
        """
        table = _Table(abi.CellTask, self._tasks.copy())
        blocks = addresses_of(kept.blocks)
        states0, states1, y, bits, in_block = self._in_block
        nodes = blocks + in_block
        nodes[-1] = kept.out.data_ptr()
        first = kept.rows.data_ptr()
        table.set("inputs", [first, first, *nodes[:-2]], 0)
        table.set("inputs", [first, *nodes[:-1]], 1)
        table.set("states", blocks + states0, 0)
        table.set("states", blocks + states1, 1)
        table.set("y", blocks + y)
        table.set("kept", np.where(self._has_bits, blocks + bits, 0))
        table.set("nodes", nodes)
        table.set("norms", kept.norms.data_ptr() + self._first_norm)
        normal, reduction = (x.data_ptr() for x in alphas)
        table.set("alphas", np.where(self._reduction, reduction, normal))
        table.set("weights", addresses.ctypes.data + self._first_weight)
        table.set("dropout_rate", kept.rate.data_ptr())
        table.set("dropout_state", kept.state.data_ptr())
        table.set("threads", torch.get_num_threads())
        return table

    def add_statistics(self, table: _Table, stats: Tensor) -> None:
        """Where a forward pass writes means and variances, float64 ``[norm_rows]``."""
        table.set("stats", stats.data_ptr() + self._first_norm)

    def moves(self, running: np.ndarray, batches: np.ndarray, stats: Tensor) -> _Table:
        """The table of all running statistics.

        Args:
            running: Addresses of means and variances, alternately, by norm.
            batches: Addresses of the counters.
            stats: As a forward pass has written them.
        """
        table = _Table(abi.RunningTask, self._moves.copy())
        table.set("running", running.ctypes.data + 2 * self._first_batch)
        table.set("batches", batches.ctypes.data + self._first_batch)
        table.set("stats", stats.data_ptr() + self._first_norm)
        return table

    def add_gradients(
        self,
        table: _Table,
        grad: Tensor,
        grad_input: Tensor | None,
        grad_alphas: Tensor,
        grad_weights: Tensor | None,
        outputs: Tensor,
        room: Tensor,
        firsts: Tensor,
    ) -> None:
        """What a backward pass reads and writes.

        Args:
            grad: Of the last output.
            grad_input: Of the first input, or None if nobody asks.
            grad_alphas: float64 ``[cells, alphas]``.
            grad_weights: ``[weights]``, or None.
            outputs: Room for the gradients of a few outputs, ``[_LIVE, largest]``.
            room: Room for everything else.
            firsts: Room for the gradients of two cells' first states: that of a cell is read when
                the one in front of it has that of its second one, ``[2, first_state]``.
        """
        cells = len(self._plans)
        base, step = outputs.data_ptr(), outputs.stride(0) * self._itemsize
        grads = base + np.arange(cells, dtype=np.int64) % _LIVE * step
        grads[-1] = grad.data_ptr()
        first = 0 if grad_input is None else grad_input.data_ptr()
        table.set("grad", grads)
        table.set("grad_inputs", [first, first, *grads[:-2]], 0)
        table.set("grad_inputs", [first, *grads[:-1]], 1)
        # From the last cell on: input 1 of a cell is also input 0 of the next one, which has been
        # there already; the first cell's two inputs are one array.
        table.set("adds", [1, *[0] * (cells - 1)], 0)
        table.set("adds", [*[1] * (cells - 1), 0], 1)
        node_grads, half_grads, state1 = (room.data_ptr() + x for x in self._in_room)
        state0 = firsts.data_ptr() + np.arange(cells) % 2 * (firsts.stride(0) * self._itemsize)
        table.set("node_grads", node_grads)
        table.set("half_grads", half_grads)
        if grad_input is None and grad_weights is None:
            # Nobody asks for what only the first input needs.
            state0[:2] = 0
            state1[0] = 0
        table.set("state_grads", state0, 0)
        table.set("state_grads", state1, 1)
        rows = np.arange(cells, dtype=np.int64) * (8 * self.alphas)
        table.set("grad_alphas", grad_alphas.data_ptr() + rows)
        if grad_weights is not None:
            table.set("grad_weights", grad_weights.data_ptr() + self._first_grad)


@lru_cache(maxsize=16)
def _geometry(keys: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Geometry:
    return Geometry(keys, shape, dtype)


@lru_cache(maxsize=64)
def _are_whole(keys: tuple[str, ...], width: int) -> bool:
    """Whether no array of these plans needs padding and their nodes are their outputs."""
    of = [plans.from_key(key) for key in keys]
    padded = any(count % width for plan in of for count in (plan.channels, *plan.in_channels))
    return not padded and all(plan.multiplier == plan.steps for plan in of)


class CompiledChain:
    """``interface.WholeChain`` over the compiled library."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def takes(self, keys: tuple[str, ...], weights: Sequence[Tensor]) -> bool:
        return _are_whole(keys, self.library.width) and are_plain(weights)

    def forward(
        self,
        keys: tuple[str, ...],
        rows: Tensor,
        alphas: Sequence[Tensor],
        weights: Sequence[Tensor],
        rate: Tensor,
        state: Tensor,
        running: Sequence[Tensor],
        batches: Sequence[Tensor],
    ) -> Kept:
        where = _geometry(keys, tuple(rows.shape), rows.dtype)
        blocks = [pool.empty((count,), rows.dtype) for count in where.blocks]
        out = pool.empty(where.outputs[-1], rows.dtype)
        norms, stats = torch.empty(2, where.norm_rows, dtype=torch.float64)
        kept = Kept(rows, out, norms, blocks, rate, state)
        doubles = [x.detach().double().contiguous() for x in alphas]
        addresses = addresses_of(weights)
        table = where.pass_of(kept, doubles, addresses)
        where.add_statistics(table, stats)
        self._run(table, backward=False)
        of_running, of_batches = addresses_of(running), addresses_of(batches)
        moves = where.moves(of_running, of_batches, stats)
        self.library.move_running(moves.numbers.ctypes.data, len(keys))
        # Autograd notices that a graph has an older value.
        torch.autograd.graph.increment_version([*running, *batches])
        return kept

    def backward(
        self,
        keys: tuple[str, ...],
        kept: Kept,
        alphas: Sequence[Tensor],
        weights: Sequence[Tensor],
        grad: Tensor,
        want_input: bool,
        want_weights: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        where = _geometry(keys, tuple(kept.rows.shape), kept.rows.dtype)
        doubles = [x.detach().double().contiguous() for x in alphas]
        addresses = addresses_of(weights)
        table = where.pass_of(kept, doubles, addresses)
        dtype = kept.rows.dtype
        if not grad.is_contiguous():
            grad = pool.empty(tuple(grad.shape), dtype).copy_(grad)
        grad_alphas = torch.empty(len(keys), where.alphas, dtype=torch.float64)
        grad_weights = pool.empty((where.weights,), torch.float32) if want_weights else None
        grad_input = pool.empty(tuple(kept.rows.shape), dtype) if want_input else None
        outputs = pool.empty((_LIVE, where.largest), dtype)
        room = pool.empty((where.room,), dtype)
        firsts = pool.empty((2, where.first_state), dtype)
        rooms = outputs, room, firsts
        where.add_gradients(table, grad, grad_input, grad_alphas, grad_weights, *rooms)
        self._run(table, backward=True)
        del outputs, room, firsts, rooms, doubles, addresses
        where.passes += 1
        if where.passes == _SETTLED:
            collapse_small_pages()
        return grad_input, grad_alphas, grad_weights

    def _run(self, table: _Table, *, backward: bool) -> None:
        numbers = table.numbers
        self.library.run_cells(numbers.ctypes.data, len(numbers), backward=backward)
