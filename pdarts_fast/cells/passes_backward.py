"""Backward pass of a cell; see ``passes``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdarts_fast.cells.context import ExtraRun
from pdarts_fast.cells.passes import CellPass
from pdarts_fast.cells.tables import Group
from pdarts_fast.kernels import moments


class CellBackward(CellPass):
    """The backward pass, last node first; constructed like ``CellPass``.

    Attributes:
        parameters: Those of custom operations.
        grad_alphas: float64, flat ``[edges * ops]``.
        grad_gains: Gradient of ``Stored.gains``, or None.
        grad_parameters: Gradients of ``parameters``, None where nothing arrived.
    """

    parameters: list[Tensor]

    def run(
        self, grad: Tensor, want_inputs: tuple[bool, bool], want_weights: bool
    ) -> list[Tensor | None]:
        """Gradients of the inputs; all others are left in the attributes.

        Args:
            grad: Of the nodes, ``[N, H, W, steps * C]``.
            want_inputs: Whether the gradient of each input is wanted.
            want_weights: Whether the weights have room for gradients.
        """
        stored, arrays, steps = self.stored, self.arrays, self.plan.steps
        self._wanted = [want or want_weights for want in want_inputs]
        self._count = stored.nodes[..., 0].numel()
        self._extra_grads: dict[int, Tensor] = {}
        self.grad_alphas = torch.zeros_like(self.alphas)
        self.grad_gains = None if stored.gains is None else torch.zeros_like(stored.gains)
        self.grad_parameters: list[Tensor | None] = [None] * len(self.parameters)
        # dy of every item that reads a state, by alpha; row 0 is the factor of a skip.
        self._coef = stored.norms.new_zeros(len(self.alphas), 3, stored.slots.shape[-1])
        shape = (self.tables.num_halves, *stored.slots.shape[1:])
        arrays.half_grads = self.backend.empty(shape, grad, stored.slots.dtype)
        masked = sum(map(len, self.tables.masked))
        # Numbers of masked gradients that are not there yet get any array of their size.
        arrays.grads = [*grad.chunk(steps, dim=-1)]
        arrays.grads += [arrays.grads[0]] * masked
        for node in reversed(range(steps)):
            self._enter(node)
            if node > 0:
                arrays.grads[node - 1] = self._gather(node + 1, arrays.grads[node - 1])
        inputs: list[Tensor | None] = [None, None]
        for which in (1, 0):
            if self._wanted[which]:
                state_grad = self._gather(which, None)
                inputs[which] = self._preprocess(which, state_grad, want_inputs[which])
        return inputs

    def _enter(self, node: int) -> None:
        """Gradients of a node's alphas, gains and custom operations; dy of all that enters it."""
        grad = self.arrays.grads[node]
        shared = self.tables.shared[node]
        if len(shared):
            self._settle(shared, grad)
        for masked in self.tables.masked[node]:
            behind = (grad * self.context.masks[masked.place]).contiguous()
            self.arrays.grads[masked.grad] = behind
            self._settle(masked.last, behind)
        self._second_halves(node)
        run = self.context.extras.get(node)
        if run is not None:
            self._differentiate(run, grad)

    def _settle(self, group: Group, grad: Tensor) -> None:
        """What operations of a node get from a gradient: normed ones first, then skips."""
        count = sum(item.slot >= 0 for item in group.call.items)
        norms = self.norms(group)
        sums = norms.new_empty(1 + len(group), grad.shape[-1])
        scale, shift = self.cast(norms[:, 0]), self.cast(norms[:, 1])
        self.backend.reduce(group.call, self.arrays, grad, scale, shift, sums)
        total, products = sums[0], sums[1:]
        factors = self.factors(group)
        alphas = group.index("alphas", self.context.device)
        if self.stored.gains is not None and count:
            rows = group.index("eval", self.context.device)[:count]
            gamma, beta = self.stored.gains.index_select(0, rows).unbind(1)
            self._add_gains(rows, factors[:count] * products[:count], factors[:count] * total)
            self.grad_alphas[alphas[:count]] = (gamma * products[:count] + beta * total).sum(1)
            self.grad_alphas[alphas[count:]] = products[count:].sum(1)
        else:
            gamma = None
            self.grad_alphas.index_copy_(0, alphas, products.sum(1))
        if count:
            behind = factors[:count] if gamma is None else factors[:count] * gamma
            coef = self._coefficients(behind, norms[:count], total, products[:count])
            bare = group.index("bare", self.context.device)
            if len(bare):
                coef[bare] = 0
                coef[bare, 0] = factors[bare]
            self._coef.index_copy_(0, alphas[:count], coef)
        self._coef[alphas[count:], 0] = factors[count:].expand(-1, grad.shape[-1])

    def _coefficients(
        self, factor: Tensor | None, norms: Tensor, total: Tensor, products: Tensor
    ) -> Tensor:
        return moments.backward_coefficients(
            factor, norms, total, products, self._count, training=self.training
        )

    def _add_gains(self, rows: Tensor, gamma: Tensor, beta: Tensor) -> None:
        """Adds gradients ``[n, C]`` to rows of ``grad_gains``."""
        if self.grad_gains is not None:
            self.grad_gains.index_add_(0, rows, torch.stack([gamma, beta], dim=1))

    def _second_halves(self, node: int) -> None:
        """From dy of separable convolutions to that of their first halves."""
        group = self.tables.enter_second[self._wanted[0] + 2 * self._wanted[1]][node]
        if not len(group):
            return
        device = self.context.device
        norms, rows = self.half_norms(group), group.index("half_eval", device)
        alphas = group.index("alphas", device)
        scale, shift = self.with_gains(norms, rows)
        sums = norms.new_empty(norms.shape)
        self.backend.mid_backward(
            group.call,
            self.arrays,
            self.cast(scale),
            self.cast(shift),
            self.cast(self._coef.index_select(0, alphas)),
            sums,
        )
        total, products = sums.unbind(1)
        gamma = None
        if self.stored.gains is not None:
            products = self._half_products(group, norms)
            gamma = self.stored.gains.index_select(0, rows)[:, 0]
            self._add_gains(rows, products, total)
        coef = self._coefficients(gamma, norms, total, products)
        self._coef.index_copy_(0, alphas, coef)

    def _half_products(self, group: Group, norms: Tensor) -> Tensor:
        """Sums of a first half's gradient times its plain BN(y), ``[n, C]``.

        A pass of its own: dividing what ``mid_backward`` sums by gamma would lose digits where
        gamma is small.
        """
        assert self.arrays.half_grads is not None
        products = torch.empty_like(norms[:, 0])
        scale, shift = self.cast(norms[:, 0]), self.cast(norms[:, 1])
        sums = norms.new_empty(2, norms.shape[-1])
        for i, call in enumerate(group.inputs):
            grad = self.arrays.half_grads[call.items[0].half]
            row = slice(i, i + 1)
            self.backend.reduce(call, self.arrays, grad, scale[row], shift[row], sums)
            products[i] = sums[1]
        return products

    def _gather(self, source: int, incoming: Tensor | None) -> Tensor:
        """Gradient of a state from all edges that leave it."""
        extra = self._extra_grads.pop(source, None)
        if extra is not None:
            incoming = extra if incoming is None else incoming + extra
        group, x = self.tables.gather[source], self.arrays.states[source]
        if not len(group) and incoming is not None:
            return incoming
        out = self.backend.empty(tuple(x.shape), x, x.dtype)
        alphas = group.index("alphas", self.context.device)
        coef = self.cast(self._coef.index_select(0, alphas))
        self.backend.fan_in(group.call, self.arrays, x, coef, incoming, out)
        return out

    def _preprocess(self, which: int, grad: Tensor, want_input: bool) -> Tensor | None:
        """Gradient of a cell input from that of the state made of it.

        The state is stored normalised, so dy is in terms of BN(y), except behind scale and shift.
        """
        if not self.tables.inputs:
            return grad
        group, row = self.tables.inputs[which], self.input_row(which)
        y = self.stored.raw[which] if self.stored.raw else self.stored.states[which]
        arrays = self.input_arrays(y)
        arrays.grads = [grad]
        norms = self.stored.norms[row : row + 1]
        identity = norms.new_tensor([1.0, 0.0])[None, :, None].expand(norms.shape)
        of_y = norms if self.stored.raw else identity
        sums = norms.new_empty(2, grad.shape[-1])
        scale, shift = self.cast(of_y[:, 0]), self.cast(of_y[:, 1])
        self.backend.reduce(group.call, arrays, grad, scale, shift, sums)
        factor = norms[:, 0]
        if self.stored.gains is not None and self.stored.raw:
            rows = self.input_gain(which)
            factor = self.stored.gains.index_select(0, rows)[:, 0]
            self._add_gains(rows, sums[1:], sums[:1])
        coef = moments.backward_coefficients(
            factor, of_y, sums[0], sums[1:], y[..., 0].numel(), training=self.training
        )
        x = self.stored.inputs[which]
        out = self.backend.empty(tuple(x.shape), x, x.dtype) if want_input else None
        self.backend.fan_in(group.call, arrays, x, self.cast(coef), None, out)
        return out

    def _differentiate(self, run: ExtraRun, grad: Tensor) -> None:
        """Backward of a node's custom operations through their own graph."""
        rows = grad[..., : self.plan.channels].permute(0, 3, 1, 2).to(run.total.dtype)
        leaves = [run.weights, *run.states.values(), *self.parameters]
        # Retained: whoever runs the outer backward pass twice runs this one twice.
        grads = torch.autograd.grad(
            run.total, leaves, rows.contiguous(), retain_graph=True, allow_unused=True
        )
        if grads[0] is not None:
            self.grad_alphas += grads[0].flatten()
        missing = grad.shape[-1] - self.plan.channels
        for source, one in zip(run.states, grads[1:], strict=False):
            if one is not None:
                term = F.pad(one.permute(0, 2, 3, 1), (0, missing)).to(grad.dtype)
                known = self._extra_grads.get(source)
                total = term if known is None else known + term
                self._extra_grads[source] = total.contiguous()
        for i, one in enumerate(grads[1 + len(run.states) :]):
            if one is not None:
                known = self.grad_parameters[i]
                self.grad_parameters[i] = one if known is None else known + one
