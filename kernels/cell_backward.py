"""Backward pass of a search cell over the primitives of any backend.

Mirrors the forward pass, last node first: ``reduce`` a node's gradient to batch sums,
``mid_backward`` through the second halves of separable convolutions, and ``fan_in`` gathers the
gradient of a state from all edges that leave it. ``moments`` has the algebra.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import moments
from .cell_pass import Pass


class Backward(Pass):
    """The backward pass; constructed like ``Pass``.

    Attributes:
        grad_alphas: float64 ``[edges, ops]``; zero where the alpha is that of ``none``.
    """

    def run(
        self, grad: Tensor, want_inputs: tuple[bool, bool], want_weights: bool
    ) -> list[Tensor | None]:
        """Gradients of the inputs; those of weights and alphas are left in the attributes.

        Args:
            grad: Of the nodes, ``[N, H, W, steps * C]``.
            want_inputs: Whether the gradient of each input is wanted.
            want_weights: Whether the weights have room for gradients.

        Returns:
            Like ``Saved.inputs``; None where not wanted.
        """
        saved, arrays, steps = self.saved, self.arrays, self.plan.steps
        self.wanted = [want or want_weights for want in want_inputs]
        self.count = saved.nodes[..., 0].numel()
        self.grad_alphas = torch.zeros_like(self.alphas)
        # dy of every item that reads a state, by (edge, op); row 0 is the factor of a skip.
        channels = saved.slots.shape[-1]
        self.coef = saved.norms.new_zeros(len(self.alphas), 3, channels)
        shape = (self.calls.num_halves, *saved.slots.shape[1:])
        arrays.half_grads = self.backend.empty(shape, grad, saved.slots.dtype)
        arrays.grads = list(grad.chunk(steps, dim=-1))
        for node in reversed(range(steps)):
            self._enter(node)
            if node > 0:
                arrays.grads[node - 1] = self._gather(node + 1, arrays.grads[node - 1])
        inputs: list[Tensor | None] = [None, None]
        for which in (0, 1):
            if self.wanted[which]:
                state_grad = self._gather(which, None)
                inputs[which] = self._preprocess(which, state_grad, want_inputs[which])
        return inputs

    def _enter(self, node: int) -> None:
        """Alpha gradients of a node's edges, and dy of everything that enters it."""
        normed, skips, both = (
            by_node[node] for by_node in (self.calls.enter, self.calls.skips, self.calls.both)
        )
        grad = self.arrays.grads[node]
        if not both.items:
            return
        norms = self.norms(normed) if normed.items else self.saved.norms[:0]
        missing = (0, 0, 0, 0, 0, len(skips.items))
        padded = F.pad(norms, missing) if skips.items else norms
        scale, shift = self.cast(padded[:, 0]), self.cast(padded[:, 1])
        sums = norms.new_empty(1 + len(both.items), grad.shape[-1])
        self.backend.reduce(both, self.arrays, grad, scale, shift, sums)
        self.grad_alphas.index_copy_(0, self.places(both).alphas, sums[1:].sum(1))
        if normed.items:
            coef = moments.backward_coefficients(
                self.factors(normed),
                norms,
                sums[0],
                sums[1 : 1 + len(normed.items)],
                self.count,
                training=self.training,
            )
            self.coef.index_copy_(0, self.places(normed).alphas, coef)
        if skips.items:
            self.coef[self.places(skips).alphas, 0] = self.factors(skips)
        self._second_halves(node)

    def _second_halves(self, node: int) -> None:
        """From dy of separable convolutions to that of their first halves."""
        call = self.calls.enter_second[self.wanted[0] + 2 * self.wanted[1]][node]
        if not call.items:
            return
        norms = self.half_norms(call)
        sums = norms.new_empty(norms.shape)
        self.backend.mid_backward(
            call,
            self.arrays,
            self.cast(norms[:, 0]),
            self.cast(norms[:, 1]),
            self.cast(self.coef.index_select(0, self.places(call).alphas)),
            sums,
        )
        coef = moments.backward_coefficients(
            None, norms, sums[:, 0], sums[:, 1], self.count, training=self.training
        )
        self.coef.index_copy_(0, self.places(call).alphas, coef)

    def _gather(self, source: int, incoming: Tensor | None) -> Tensor:
        """Gradient of a state from all edges that leave it."""
        call, x = self.calls.gather[source], self.arrays.states[source]
        out = self.backend.empty(tuple(x.shape), x, x.dtype)
        coef = self.cast(self.coef.index_select(0, self.places(call).alphas))
        self.backend.fan_in(call, self.arrays, x, coef, incoming, out)
        return out

    def _preprocess(self, which: int, grad: Tensor, want_input: bool) -> Tensor | None:
        """Gradient of a cell input from that of the state made of it.

        The state is stored normalised, so dy is in terms of BN(y): its own scale is 1, shift 0.
        """
        call, arrays = self.calls.inputs[which], self.input_arrays(which)
        arrays.grads = [grad]
        channels = grad.shape[-1]
        # Filled on the device: a tensor made of numbers would be copied there in every step.
        identity = self.saved.norms.new_zeros(2, channels)
        identity[0].fill_(1.0)
        sums = self.saved.norms.new_empty(2, channels)
        one, zero = self.cast(identity[:1]), self.cast(identity[1:])
        self.backend.reduce(call, arrays, grad, one, zero, sums)
        coef = moments.backward_coefficients(
            self.saved.norms[self.input_row(which), 0],
            identity[None],
            sums[0],
            sums[1:],
            self.saved.states[which][..., 0].numel(),
            training=self.training,
        )
        x = self.saved.inputs[which]
        out = self.backend.empty(tuple(x.shape), x, x.dtype) if want_input else None
        self.backend.fan_in(call, arrays, x, self.cast(coef), None, out)
        return out
