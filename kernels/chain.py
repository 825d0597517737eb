"""All cells of a supernet as one node of autograd, where a backend runs them in one call.

Cell by cell, a tenth of a pass is Python and autograd between two calls of a backend, with caches
that the kernels have emptied. A chain does for all cells at once what leads to a call, and
gradients of a cell's output are added where they arise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pdarts_fast.hooks import has_hooks, hooks_on_all_modules

from . import plan as plans
from .cell import Names, prepare
from .cell_operator import NO_SECOND_DERIVATIVE, whole_cell
from .rows import as_image, as_rows, attach_refusal, is_traced, storage_dtype


@dataclass(slots=True)
class Kept:
    """What the backward pass of a chain reads beside weights and alphas.

    Attributes:
        rows: The first input, ``[N, H, W, C]``.
        out: The last output, ``[N, H, W, steps * C]``.
        norms: Scale and shift of every BatchNorm, float64.
        blocks: A cell's other arrays, as the backend places them.
        rate, state: Of the skip dropout: float32 ``[1]``, int64 ``[2]``.
    """

    rows: Tensor
    out: Tensor
    norms: Tensor
    blocks: list[Tensor]
    rate: Tensor
    state: Tensor


class WholeChain(Protocol):
    """What a backend may offer instead of being called a cell at a time, in training."""

    def takes(self, keys: tuple[str, ...], weights: Sequence[Tensor]) -> bool:
        """Whether it runs the cells of these plans with these weights."""
        ...

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
        """What ``cell.run`` does for every cell, running statistics included.

        Args:
            keys: Plans of the cells.
            rows: Both inputs of the first cell, ``[N, H, W, C]``, contiguous.
            alphas: Weights of the operations of normal and of reduction cells, ``[edges, k]``.
            weights, running, batches: Of all cells; see ``cell_operator``.
            rate, state: Of the skip dropout.
        """
        ...

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
        """Gradients of ``rows`` and of all weights, None where not wanted, and of the alphas.

        Args:
            grad: Of the last output, ``[N, H, W, steps * C]``, of any strides.

        Returns:
            ``rows``' gradient; float64 ``[cells, edges * k]``; float32, all weights in order.
        """
        ...


_RUNNERS: dict[str, WholeChain] = {}


def register(name: str, chain: WholeChain) -> None:
    """Makes a backend's chains available to ``run``."""
    _RUNNERS[name] = chain


class _Modules:
    """The modules of cells that hold weights and statistics, one after the other."""

    def __init__(self, cells: Sequence[Any]) -> None:
        names: list[Names] = [cell.__dict__.get("fused_names") or prepare(cell) for cell in cells]
        self.cells = list(cells)
        self.names = names
        self.keys = tuple(name.key for name in names)
        self.reduction = [plans.from_key(key).reduction for key in self.keys]
        controls = {id(name.dropout): name.dropout for name in names if name.dropout is not None}
        self.dropouts = list(controls.values())
        self.convolutions = [module for name in names for module in name.convolutions]
        self.norms = [norm for name in names for norm in name.norms]
        self._parts: list[tuple[torch.Size, tuple[int, ...], int]] = []

    def parts(self, flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Every weight's part of numbers that follow one another.

        One operation each: they are made with caches that the kernels have emptied, where torch's
        way, a slice and a view, took twice as long.
        """
        if not self._parts:
            begin = 0
            for weight in weights:
                self._parts.append((weight.shape, weight.stride(), begin))
                begin += weight.numel()
        return [flat.as_strided(*part) for part in self._parts]

    def are_of(self, cells: Sequence[Any]) -> bool:
        """Whether these are still the modules of the cells."""
        return len(cells) == len(self.cells) and all(
            cell is own and cell.__dict__.get("fused_names") is name
            for cell, own, name in zip(cells, self.cells, self.names, strict=True)
        )


def _modules(cells: nn.ModuleList) -> _Modules:
    found = cells.__dict__.get("fused_chain")
    if found is None or not found.are_of(list(cells)):
        found = cells.__dict__["fused_chain"] = _Modules(list(cells))
    return found


def _is_plain(cell: nn.Module, cls: type) -> bool:
    """Whether calling a cell in training does what its class does and nothing else."""
    own = cell.__dict__
    changed = type(cell) is not cls or "forward" in own or "_is_replica" in own
    return cell.training and not changed and not has_hooks(cell)


def run(
    backend: str, cls: type, cells: nn.ModuleList, s: Tensor, normal: Tensor, reduction: Tensor
) -> Tensor | None:
    """Output of the last cell in training, or None where cells have to be called one by one.

    Args:
        backend: A name of ``kernels.backends``.
        cls: Class of the cells.
        cells: Of a supernet, each called with the outputs of the two before it.
        s: Both inputs of the first one, ``[N, C, H, W]``.
        normal, reduction: Weights of the operations, ``[edges, k]``.

    Returns:
        ``[N, multiplier * C, H_out, W_out]``, channels-last in memory.
    """
    runner = _RUNNERS.get(backend)
    if runner is None or is_traced(s) or hooks_on_all_modules():
        return None
    dtype = storage_dtype(s)
    if whole_cell(backend, dtype) is None or not all(_is_plain(cell, cls) for cell in cells):
        return None
    modules = _modules(cells)
    if len(modules.dropouts) > 1:
        return None
    weights: list[Any] = [module._parameters.get("weight") for module in modules.convolutions]
    if any(weight is None for weight in weights) or not runner.takes(modules.keys, weights):
        return None
    return _EagerChain.apply(_Call(runner, modules, dtype), s, normal, reduction, *weights)


@dataclass(slots=True)
class _Call:
    """What a call of a chain needs beside tensors with gradients."""

    runner: WholeChain
    modules: _Modules
    dtype: torch.dtype

    def dropout(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Rate and state of the skip dropout as they are now."""
        if not self.modules.dropouts:
            return s.new_zeros(1, dtype=torch.float32), s.new_zeros(2, dtype=torch.int64)
        (control,) = self.modules.dropouts
        return control.p.clone(), control.state.clone()

    def statistics(self) -> tuple[list[Any], list[Any]]:
        """Running means and variances, alternately, and the counters."""
        buffers = [norm._buffers for norm in self.modules.norms]
        running = [b for own in buffers for b in (own["running_mean"], own["running_var"])]
        return running, [own["num_batches_tracked"] for own in buffers]

    def gradient_of(self, alphas: Tensor, by_cell: Tensor, *, reduction: bool) -> Tensor:
        """Gradient of the alphas of one type of cells, added up as autograd adds them."""
        total = torch.zeros_like(alphas).flatten()
        rows = by_cell.to(alphas.dtype).unbind()
        for kind, part in zip(self.modules.reduction[::-1], rows[::-1], strict=True):
            if kind == reduction:
                total += part
        return total.view(alphas.shape)


class _EagerChain(torch.autograd.Function):
    """All cells, from the first input to the last output."""

    @staticmethod
    def forward(ctx, call, s, normal, reduction, *weights):
        dropout = call.dropout(s)
        rows = as_rows(s, call.dtype, s.shape[1])
        alphas = (normal, reduction)
        kept = call.runner.forward(
            call.modules.keys, rows, alphas, weights, *dropout, *call.statistics()
        )
        out = kept.out.permute(0, 3, 1, 2)
        copies = [] if rows.data_ptr() == s.data_ptr() else [rows]
        ctx.call, ctx.num_copies = call, len(copies)
        arrays = (kept.norms, out, *copies, *kept.blocks)
        ctx.save_for_backward(s, *alphas, *dropout, *arrays, *weights)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad):
        call, wants = ctx.call, ctx.needs_input_grad
        if grad is None:
            return (None,) * len(wants)
        s, normal, reduction, rate, state, norms, out, *rest = ctx.saved_tensors
        copies, rest = rest[: ctx.num_copies], rest[ctx.num_copies :]
        keys = call.modules.keys
        blocks, weights = rest[: len(keys)], rest[len(keys) :]
        rows = copies[0] if copies else s.detach().permute(0, 2, 3, 1)
        kept = Kept(rows, out.detach().permute(0, 2, 3, 1), norms, blocks, rate, state)
        grad_rows = grad.detach().to(call.dtype).permute(0, 2, 3, 1)
        want_weights = wants[4:]
        of_rows, by_cell, flat = call.runner.backward(
            keys, kept, (normal, reduction), weights, grad_rows, wants[1], any(want_weights)
        )
        parts = [None] * len(weights) if flat is None else call.modules.parts(flat, weights)
        grads = [
            None if of_rows is None else as_image(of_rows, s),
            call.gradient_of(normal, by_cell, reduction=False),
            call.gradient_of(reduction, by_cell, reduction=True),
            *parts,
        ]
        found = [g if want else None for g, want in zip(grads, wants[1:], strict=True)]
        if torch.is_grad_enabled():
            found = attach_refusal(found, ctx.saved_tensors, *NO_SECOND_DERIVATIVE)
        return (None, *found)
