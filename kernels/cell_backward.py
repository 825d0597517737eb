"""Backward pass of a search cell over the primitives of any backend.

Mirrors the forward pass, last node first: ``reduce`` a node's gradient to batch sums,
``mid_backward`` through the second halves of separable convolutions, and ``fan_in`` gathers the
gradient of a state from all edges that leave it. ``moments`` has the algebra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments
from . import plan as plans
from .cell_pass import Gradients, Pass, Saved, give_weights
from .operation import Operation
from .plan import Branch


class Backward(Pass):
    """The backward pass.

    Args:
        want_inputs: Whether the gradient of each input is wanted.
        want_weights: Whether weight gradients are wanted; ``weights`` has room for them then.
        others: As for ``Pass``.
    """

    def __init__(
        self, *others: object, want_inputs: tuple[bool, bool], want_weights: bool
    ) -> None:
        super().__init__(*others)  # type: ignore[arg-type]
        self.want_inputs = want_inputs
        self.want_weights = want_weights
        self.grad_alphas = torch.zeros_like(self.alphas)
        # Per branch, for fan_in: gradient of its first output, and coefficients of dy.
        self._grad: dict[tuple[int, int], Tensor] = {}
        self._coef: dict[tuple[int, int], Tensor] = {}

    def wants(self, source: int) -> bool:
        """Whether the gradient of a state is needed by anyone."""
        return source >= 2 or self.want_weights or self.want_inputs[source]

    def run(self, saved: Saved, grad: Tensor) -> Gradients:
        """Gradients for ``grad`` of the nodes, ``[N, H, W, steps * C]``."""
        channels = saved.slots.shape[-1]
        node_grad = grad[..., (self.plan.steps - 1) * channels :]
        for node in reversed(range(self.plan.steps)):
            self._enter(saved, node, node_grad)
            if node > 0:
                incoming = grad[..., (node - 1) * channels : node * channels]
                node_grad = self._gather(saved, node + 1, incoming)
        inputs: list[Tensor | None] = [None, None]
        for which in (1, 0):
            if self.wants(which):
                inputs[which] = self._preprocess(saved, which, self._gather(saved, which, None))
        weights = self.weights.gradient(saved.stats.dtype) if self.want_weights else None
        return Gradients(inputs, self.grad_alphas, weights)

    def _enter(self, saved: Saved, node: int, grad: Tensor) -> None:
        """Alpha gradients of a node's edges, and dy of every branch as coefficients."""
        entering = self.plan.entering(node)
        if not entering:
            return
        normed = [branch for branch in entering if branch.kind != plans.SKIP]
        skips = [branch for branch in entering if branch.kind == plans.SKIP]
        sums = saved.stats.new_empty(len(entering), 2, saved.slots.shape[-1])
        total = saved.stats.new_empty(saved.slots.shape[-1])
        operations = []
        if normed:
            scale, shift = self.normalise(saved, [self.row(branch) for branch in normed])
            scales, shifts = self.cast(saved, scale).unbind(), self.cast(saved, shift).unbind()
            for i, branch in enumerate(normed):
                operation = Operation(branch.kind, y=saved.slots[branch.slot], sums=sums[i])
                operation.scale, operation.shift = scales[i], shifts[i]
                operations.append(operation)
        for i, branch in enumerate(skips, len(normed)):
            operation = self.skip(branch, saved)
            operation.sums = sums[i]
            operations.append(operation)
        self.backend.reduce(grad, operations, total, self.dropout)
        ordered = normed + skips
        edges = [branch.edge for branch in ordered]
        self.grad_alphas[edges, [branch.op for branch in ordered]] = sums[:, 0].sum(1)
        for branch in ordered:
            self._grad[branch.edge, branch.op] = grad
        if normed:
            self._remember(saved, normed, total, sums[: len(normed), 0])
        self._second_halves(saved, grad, [b for b in normed if b.first >= 0])

    def _remember(
        self, saved: Saved, branches: list[Branch], total: Tensor, products: Tensor
    ) -> None:
        picked = saved.stats[[self.row(branch) for branch in branches]]
        coef = moments.backward_coefficients(
            self.alpha(branches)[:, None],
            picked[:, 0],
            picked[:, 1],
            total,
            products,
            saved.nodes[..., 0].numel(),
            training=self.training,
        )
        for branch, one in zip(branches, self.cast(saved, coef).unbind(), strict=True):
            self._coef[branch.edge, branch.op] = one

    def _second_halves(self, saved: Saved, grad: Tensor, branches: list[Branch]) -> None:
        """From dy of separable convolutions to the gradient of their first halves' outputs."""
        branches = [branch for branch in branches if self.wants(branch.source)]
        if not branches:
            return
        rows = [self.row(branch, 1) for branch in branches]
        scale, shift = self.normalise(saved, rows)
        scales, shifts = self.cast(saved, scale).unbind(), self.cast(saved, shift).unbind()
        sums = saved.stats.new_empty(len(branches), 2, saved.slots.shape[-1])
        operations = []
        for i, branch in enumerate(branches):
            operation = self.convolution(branch, 1)
            operation.input = saved.slots[branch.first]
            operation.scale, operation.shift = scales[i], shifts[i]
            operation.y = saved.slots[branch.slot]
            operation.grad = grad
            operation.coef = self._coef[branch.edge, branch.op]
            operation.grad_input = torch.empty_like(operation.input)
            operation.sums = sums[i]
            operations.append(operation)
        self.backend.mid_backward(operations)
        coef = moments.backward_coefficients(
            torch.ones_like(scale[:, :1]),
            saved.stats[rows, 0],
            saved.stats[rows, 1],
            sums[:, 0],
            sums[:, 1],
            saved.nodes[..., 0].numel(),
            training=self.training,
        )
        casted = self.cast(saved, coef).unbind()
        for branch, operation, one in zip(branches, operations, casted, strict=True):
            assert operation.grad_input is not None
            self._grad[branch.edge, branch.op] = operation.grad_input
            self._coef[branch.edge, branch.op] = one

    def _gather(self, saved: Saved, source: int, incoming: Tensor | None) -> Tensor:
        """Gradient of a state from all edges that leave it."""
        x = self.state(saved, source)
        operations = []
        for branch in self.plan.leaving(source):
            key = (branch.edge, branch.op)
            if branch.kind == plans.SKIP:
                operation = self.skip(branch, saved)
                weight = self.alphas[branch.edge, branch.op].expand(x.shape[-1])
                operation.scale = self.cast(saved, weight).contiguous()
            else:
                operation = self.convolution(branch, 0)
                slot = branch.first if branch.first >= 0 else branch.slot
                operation.y = saved.slots[slot]
                operation.coef = self._coef.pop(key)
            operation.grad = self._grad.pop(key)
            operations.append(operation)
        out = x.new_empty(x.shape)
        self.backend.fan_in(x, operations, incoming, out, self.dropout)
        return out

    def _preprocess(self, saved: Saved, which: int, grad: Tensor) -> Tensor | None:
        """Gradient of a cell input from that of the state made of it."""
        row = self.input_row(which)
        state = saved.states[which]
        ones = saved.stats.new_ones(state.shape[-1])
        probe = Operation(plans.POINTWISE, y=state, sums=saved.stats.new_empty(2, len(ones)))
        probe.scale, probe.shift = self.cast(saved, ones), self.cast(saved, ones * 0)
        total = torch.empty_like(ones)
        self.backend.reduce(grad, [probe], total, self.dropout)
        assert probe.sums is not None
        coef = moments.input_backward_coefficients(
            saved.stats[row, 1],
            total,
            probe.sums[0],
            state[..., 0].numel(),
            training=self.training,
        )
        operation = Operation(self.plan.input_kind(which), y=state, grad=grad)
        operation.stride = 2 if operation.kind == plans.FACTORIZED else 1
        give_weights(operation, self.weights.of_input(which))
        operation.coef = self.cast(saved, coef)
        x = saved.inputs[which]
        out = torch.empty_like(x) if self.want_inputs[which] else None
        self.backend.fan_in(x, [operation], None, out, self.dropout)
        return out
