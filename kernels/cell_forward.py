"""Forward pass of a search cell over the primitives of any backend.

One state after the other: ``fan_out`` computes everything that leaves the state, ``mid`` the
second halves of separable convolutions, ``mix`` the next node. Between two primitives lies a
batch-wide synchronisation (the BatchNorm statistics) and a little float64 algebra.

Source: arXiv 1904.12760, section 3.1; BatchNorm as in arXiv 1502.03167.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plan as plans
from .cell_pass import Pass, Saved, give_weights
from .operation import Operation
from .plan import Branch


class Forward(Pass):
    """The forward pass: fills the arrays of a ``Saved``."""

    def run(self, saved: Saved) -> None:
        """Computes states, slots, nodes and, in training, the statistics."""
        for which in (0, 1):
            self._preprocess(saved, which)
        for source in range(2 + self.plan.steps):
            if source >= 2:
                self._mix(saved, source - 2)
            if source < 1 + self.plan.steps:
                self._leave(saved, source)

    def _sums(self, saved: Saved, row: int) -> Tensor | None:
        """Where a primitive writes the statistics of a slot."""
        return saved.stats[row] if self.training else torch.empty_like(saved.stats[0])

    def _preprocess(self, saved: Saved, which: int) -> None:
        operation = Operation(self.plan.input_kind(which))
        operation.stride = 2 if operation.kind == plans.FACTORIZED else 1
        give_weights(operation, self.weights.of_input(which))
        operation.y = saved.states[which]
        operation.sums = self._sums(saved, self.input_row(which))
        self.backend.fan_out(saved.inputs[which], [operation])
        scale, shift = self.normalise(saved, [self.input_row(which)])
        self.backend.affine_(
            saved.states[which], self.cast(saved, scale[0]), self.cast(saved, shift[0])
        )

    def _leave(self, saved: Saved, source: int) -> None:
        """Everything on the edges that leave a state, up to the last BatchNorm."""
        leaving = self.plan.leaving(source)
        first, separable = [], []
        for branch in leaving:
            if branch.kind == plans.SKIP or branch.shared:
                continue
            operation = self.convolution(branch, 0)
            halves = branch.first >= 0
            slot = branch.first if halves else branch.slot
            operation.y = saved.slots[slot]
            operation.sums = self._sums(saved, self.row(branch, int(halves)))
            first.append(operation)
            if halves:
                separable.append(branch)
        if first:
            self.backend.fan_out(self.state(saved, source), first)
        if separable:
            self._second_halves(saved, separable)

    def _second_halves(self, saved: Saved, separable: list[Branch]) -> None:
        scale, shift = self.normalise(saved, [self.row(branch, 1) for branch in separable])
        scales, shifts = self.cast(saved, scale).unbind(), self.cast(saved, shift).unbind()
        operations = []
        for branch, one_scale, one_shift in zip(separable, scales, shifts, strict=True):
            operation = self.convolution(branch, 1)
            operation.input = saved.slots[branch.first]
            operation.scale, operation.shift = one_scale, one_shift
            operation.y = saved.slots[branch.slot]
            operation.sums = self._sums(saved, self.row(branch))
            operations.append(operation)
        self.backend.mid(operations)

    def _mix(self, saved: Saved, node: int) -> None:
        entering = self.plan.entering(node)
        normed = [branch for branch in entering if branch.kind != plans.SKIP]
        skips = [branch for branch in entering if branch.kind == plans.SKIP]
        total = saved.stats.new_zeros(saved.slots.shape[-1])
        operations = []
        if normed:
            scale, shift = self.normalise(saved, [self.row(branch) for branch in normed])
            alpha = self.alpha(normed)[:, None]
            total = (alpha * shift).sum(0)
            scales = self.cast(saved, alpha * scale).unbind()
            for branch, one_scale in zip(normed, scales, strict=True):
                operations.append(
                    Operation(branch.kind, y=saved.slots[branch.slot], scale=one_scale)
                )
        for branch, weight in zip(skips, self.alpha(skips) if skips else (), strict=True):
            operation = self.skip(branch, saved)
            operation.scale = self.cast(saved, weight.expand(total.shape)).contiguous()
            operations.append(operation)
        out = self.state(saved, node + 2)
        self.backend.mix(operations, self.cast(saved, total), out, self.dropout)
