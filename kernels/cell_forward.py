"""Forward pass of a search cell over the primitives of any backend.

One state after the other: ``fan_out`` computes everything that leaves the state, ``mid`` the
second halves of separable convolutions, ``mix`` the next node. Between two primitives lies a
batch-wide synchronisation (the BatchNorm statistics) and a little float64 algebra.

Source: arXiv 1904.12760, section 3.1; BatchNorm as in arXiv 1502.03167.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments
from .calls import Call
from .cell_pass import Pass


class Forward(Pass):
    """The forward pass: fills the arrays of a ``Saved``.

    Attributes:
        stats: Mean and biased variance of the batch, float64 ``[slots + 2, 2, C]``.
    """

    def run(self, stats: Tensor) -> None:
        """Computes states, slots, nodes and, in training, statistics and normalisation.

        Args:
            stats: Written in training; see ``Attributes``.
        """
        self.stats = stats
        for which in (0, 1):
            self._preprocess(which)
        for source in range(2 + self.plan.steps):
            if source >= 2:
                self._mix(source - 2)
            if source <= self.plan.steps:
                self._leave(source)

    def _sums(self, call: Call) -> Tensor:
        return self.saved.norms.new_empty(len(call.items), 2, self.saved.slots.shape[-1])

    def _remember(self, call: Call, sums: Tensor) -> None:
        """Keeps the statistics of a call's slots; in evaluation they are not used."""
        if self.training:
            self.stats.index_copy_(0, self.places(call).slots, sums)
            self.saved.norms.index_copy_(0, self.places(call).slots, moments.normalisation(sums))

    def _preprocess(self, which: int) -> None:
        call, row = self.calls.inputs[which], self.input_row(which)
        sums = self._sums(call)
        self.backend.fan_out(call, self.input_arrays(which), self.saved.inputs[which], sums)
        if self.training:
            self.stats[row] = sums[0]
            self.saved.norms[row] = moments.normalisation(sums)[0]
        scale, shift = self.cast(self.saved.norms[row])
        self.backend.affine_(self.saved.states[which], scale, shift)

    def _leave(self, source: int) -> None:
        """Everything on the edges that leave a state, up to the last BatchNorm."""
        first, second = self.calls.leave[source], self.calls.second[source]
        if first.items:
            sums = self._sums(first)
            self.backend.fan_out(first, self.arrays, self.arrays.states[source], sums)
            self._remember(first, sums)
        if second.items:
            scale, shift = self.half_norms(second).unbind(1)
            sums = self._sums(second)
            self.backend.mid(second, self.arrays, self.cast(scale), self.cast(shift), sums)
            self._remember(second, sums)

    def _mix(self, node: int) -> None:
        normed, skips = self.calls.enter[node], self.calls.skips[node]
        out = self.arrays.states[node + 2]
        total = self.saved.norms.new_zeros(out.shape[-1])
        scales = []
        if normed.items:
            scale, shift = self.norms(normed).unbind(1)
            factors = self.factors(normed)
            scales.append(factors * scale)
            total = (factors * shift).sum(0)
        if skips.items:
            scales.append(self.factors(skips).expand(-1, out.shape[-1]))
        scale = torch.cat(scales) if scales else total[None, :0]
        call = self.calls.both[node]
        self.backend.mix(call, self.arrays, self.cast(scale), self.cast(total), out)
