"""Forward pass of a cell over the primitives of any backend.

As ``kernels.cell_forward``, and beyond it:

* BatchNorms with scale gamma and shift beta: ``alpha (gamma BN(y) + beta)`` is again a scale and a
  shift of y, per channel;
* pools without BatchNorm;
* skip dropout and drop-path with masks from torch's own generator, drawn in the order in which
  the unmodified cell draws them, so that a run sees the same masks;
* custom operations, evaluated by their own modules and added to the node's sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdarts_fast.cells.context import Context, ExtraRun, Stored
from pdarts_fast.cells.plan import Extra, Place, place_of
from pdarts_fast.cells.tables import Group, Tables
from pdarts_fast.kernels import moments
from pdarts_fast.kernels.interface import Arrays, Backend


class CellPass:
    """One forward or backward pass of a cell.

    Args:
        backend: Runs the primitives.
        context: The call.
        tables: The calls of the primitives.
        stored: Arrays to write in a forward pass, to read in a backward pass.
        arrays: The same for the primitives.
        alphas: Weights of the operations, ``[edges, ops]``.
    """

    def __init__(
        self,
        backend: Backend,
        context: Context,
        tables: Tables,
        stored: Stored,
        arrays: Arrays,
        alphas: Tensor,
    ) -> None:
        self.backend = backend
        self.context = context
        self.plan = context.plan
        self.tables = tables
        self.stored = stored
        self.arrays = arrays
        self.training = context.training
        self.alphas = alphas.detach().double().flatten()
        self.dtype = backend.coefficient_dtype(stored.slots.dtype)

    def norms(self, group: Group) -> Tensor:
        """Scale and shift of plain BatchNorm of a group's items, float64 ``[n, 2, C]``."""
        name = "train" if self.training else "eval"
        return self.stored.norms.index_select(0, group.index(name, self.context.device))

    def half_norms(self, group: Group) -> Tensor:
        """The same of what a group's second halves read."""
        name = "half_train" if self.training else "half_eval"
        return self.stored.norms.index_select(0, group.index(name, self.context.device))

    def with_gains(self, norms: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[n, C]`` with gamma and beta of ``rows`` of ``Stored.gains``."""
        scale, shift = norms.unbind(1)
        if self.stored.gains is None:
            return scale, shift
        gamma, beta = self.stored.gains.index_select(0, rows).unbind(1)
        return gamma * scale, gamma * shift + beta

    def input_row(self, which: int) -> int:
        """Row of an input in ``Stored.norms``."""
        return (self.plan.num_slots if self.training else len(self.plan.norms) - 2) + which

    def input_gain(self, which: int) -> Tensor:
        """Row of an input in ``Stored.gains``, ``[1]``."""
        return torch.tensor([len(self.plan.norms) - 2 + which], device=self.context.device)

    def factors(self, group: Group) -> Tensor:
        """Alphas of a group's items, float64 ``[n, 1]``."""
        return self.alphas.index_select(0, group.index("alphas", self.context.device))[:, None]

    def cast(self, x: Tensor) -> Tensor:
        """float64 to the dtype in which the backend wants coefficients."""
        return x.to(self.dtype).contiguous()

    def input_arrays(self, y: Tensor) -> Arrays:
        """The arrays of a call of ``Tables.inputs`` that writes or read ``y``."""
        arrays = self.arrays
        return Arrays(
            y=y[None],
            states=arrays.states,
            weights=arrays.weights,
            rate=arrays.rate,
            state=arrays.state,
            channels=arrays.channels,
            training=False,
            grads=[],
        )


class CellForward(CellPass):
    """The forward pass.

    Attributes:
        stats: Mean and biased variance of the batch, float64 ``[slots + 2, 2, C]``.
    """

    def run(self) -> None:
        """Fills ``Stored`` and, in training, ``stats``."""
        self.stats = torch.zeros_like(self.stored.norms[: self.plan.num_slots + 2])
        for which in range(len(self.tables.inputs)):
            self._preprocess(which)
        for source in range(2 + self.plan.steps):
            if source >= 2:
                self._mix(source - 2)
            if source <= self.plan.steps:
                self._leave(source)

    def _sums(self, group: Group) -> Tensor:
        return self.stats.new_empty(len(group), 2, self.stored.slots.shape[-1])

    def _remember(self, group: Group, sums: Tensor) -> None:
        """Keeps the statistics of a group's slots; in evaluation they are not used."""
        if self.training:
            slots = group.index("slots", self.context.device)
            self.stats.index_copy_(0, slots, sums)
            self.stored.norms.index_copy_(0, slots, moments.normalisation(sums))

    def _preprocess(self, which: int) -> None:
        group, row, state = self.tables.inputs[which], self.input_row(which), self.stored.states
        y = self.stored.raw[which] if self.stored.raw else state[which]
        sums = self._sums(group)
        x = self.stored.inputs[which]
        self.backend.fan_out(group.call, self.input_arrays(y), x, sums)
        if self.training:
            self.stats[row] = sums[0]
            self.stored.norms[row] = moments.normalisation(sums)[0]
        norms = self.stored.norms[row : row + 1]
        scale, shift = map(self.cast, self.with_gains(norms, self.input_gain(which)))
        if self.stored.raw:
            self.backend.mix(group.call, self.input_arrays(y), scale, shift[0], state[which])
        else:
            self.backend.affine_(state[which], scale[0], shift[0])

    def _leave(self, source: int) -> None:
        """Everything on the edges that leave a state, up to the last BatchNorm."""
        first, second = self.tables.leave[source], self.tables.second[source]
        if len(first):
            sums = self._sums(first)
            self.backend.fan_out(first.call, self.arrays, self.arrays.states[source], sums)
            self._remember(first, sums)
        if len(second):
            rows = second.index("half_eval", self.context.device)
            scale, shift = self.with_gains(self.half_norms(second), rows)
            sums = self._sums(second)
            args = (self.cast(scale), self.cast(shift), sums)
            self.backend.mid(second.call, self.arrays, *args)
            self._remember(second, sums)

    def _mix(self, node: int) -> None:
        self._draw(node)
        normed, skips = self.tables.normed[node], self.tables.skips[node]
        dropped = self.context.drop_path > 0 and len(normed) > 0
        out = self.arrays.states[node + 2]
        total = self.stats.new_zeros(out.shape[-1])
        scales, scale, shifts = [], total[None, :0], total[None]
        if len(normed):
            rows = normed.index("eval", self.context.device)
            scale, shift = self.with_gains(self.norms(normed), rows)
            factors = self.factors(normed)
            scale, shifts = factors * scale, factors * shift
            if not dropped:
                scales, total = [scale], shifts.sum(0)
        if len(skips):
            scales.append(self.factors(skips).expand(-1, out.shape[-1]))
            self._mask_states(skips)
        if scales or not dropped:
            call = self.tables.mix[node].call
            both = torch.cat(scales) if scales else total[None, :0]
            self.backend.mix(call, self.arrays, self.cast(both), self.cast(total), out)
        if dropped:
            self._add_dropped(normed, scale, shifts, out, bool(scales))
        self._add_extras(node, out)

    def _add_dropped(
        self, normed: Group, scale: Tensor, shift: Tensor, out: Tensor, add: bool
    ) -> None:
        """``out = mask * (scale * y + shift)``, summed over a node's operations behind drop-path.

        Args:
            scale, shift: float64 ``[n, C]``.
            add: Whether to add to what ``out`` holds.
        """
        slots, wide = self.stored.slots, self.dtype
        places = [(item.edge, item.op) for item in normed.call.items]
        masks = torch.stack([self.context.masks[place].flatten() for place in places]).double()
        scale = (masks[:, :, None] * scale[:, None]).to(wide)[:, :, None, None]
        by_image = (masks.t() @ shift).to(wide)[:, None, None]
        total = out.to(wide) + by_image if add else by_image
        for item, factor in zip(normed.call.items[:-1], scale, strict=False):
            total = torch.addcmul(total, slots[item.slot].to(wide), factor)
        last = slots[normed.call.items[-1].slot].to(wide)
        if out.dtype == wide:
            torch.addcmul(total, last, scale[-1], out=out)
        else:
            out.copy_(torch.addcmul(total, last, scale[-1]))

    def _mask_states(self, skips: Group) -> None:
        """Copies of what skips read, behind their dropout."""
        for item in skips.call.items:
            place = (item.edge, item.op)
            if place in self.tables.states:
                masked = self.arrays.states[item.source] * self.context.masks[place]
                self.arrays.states[self.tables.states[place]] = masked

    def _add_extras(self, node: int, out: Tensor) -> None:
        run = self.context.extras.get(node)
        if run is not None:
            out[..., : self.plan.channels].add_(run.total.detach().permute(0, 2, 3, 1))
            if not self.context.record:
                del self.context.extras[node]

    def _draw(self, node: int) -> None:
        """Masks and custom operations of a node, in the order in which modules are called."""
        context = self.context
        extras: dict[Place, Extra] = {place_of(e): e for e in self.plan.extras if e.node == node}
        skips = {(item.edge, item.op): item for item in self.tables.skips[node].call.items}
        dropped = [place for place in skips if place in context.rates]
        if not extras and not dropped and (context.drawn or not context.drop_path):
            return
        weights = self.alphas.to(context.image_dtype).view(len(self.plan.sizes), -1)
        weights.requires_grad_(context.record)
        states: dict[int, Tensor] = {}
        terms: dict[Place, Tensor] = {}
        for place in sorted({*extras, *dropped}):
            if place not in extras:
                context.masks[place] = self._keep(skips[place].source, context.rates[place])
                continue
            source = extras[place].source
            if source not in states:
                states[source] = self._image(source)
            with context.caller_modes():
                terms[place] = weights[place] * context.modules[place](states[source])
        if context.drop_path > 0:
            self._draw_paths(node, terms)
        if terms:
            with context.caller_modes():
                first, *others = terms.values()
                total = sum(others, start=first)
            context.extras[node] = ExtraRun(total, states, weights)

    def _image(self, source: int) -> Tensor:
        """A state as custom operations expect it: ``[N, C, H, W]``, contiguous."""
        state = self.arrays.states[source][..., : self.plan.channels]
        image = state.permute(0, 3, 1, 2).to(self.context.image_dtype, copy=True)
        return image.contiguous().requires_grad_(self.context.record)

    def _keep(self, source: int, rate: float) -> Tensor:
        """What dropout multiplies by, ``[N, H, W, C]``: torch's own draw for a ``[N, C, H, W]``."""
        state = self.arrays.states[source]
        batch, height, width, padded = state.shape
        shape = (batch, self.plan.channels, height, width)
        empty = state.new_empty(shape, dtype=self.context.image_dtype)
        if empty.device.type == "cpu" and rate < 1:
            # What torch's dropout does there, without the passes over an image of ones.
            drawn, divisor = empty.bernoulli_(1 - rate), 1 - rate
        else:
            drawn, divisor = nn.functional.dropout(empty.fill_(1), rate, training=True), 1.0
        keep = state.new_empty(state.shape)
        if padded > self.plan.channels:
            keep.zero_()
        return self._divided(drawn, divisor, keep)

    def _divided(self, drawn: Tensor, divisor: float, keep: Tensor) -> Tensor:
        rows, target = drawn.permute(0, 2, 3, 1), keep[..., : self.plan.channels]
        if keep.dtype == drawn.dtype:
            torch.div(rows, divisor, out=target)
        else:
            target.copy_(rows / divisor)
        return keep

    def _draw_paths(self, node: int, terms: dict[Place, Tensor]) -> None:
        """Draws a factor for every image and operation of a node but identities."""
        keep = 1.0 - self.context.drop_path
        normed = {(item.edge, item.op) for item in self.tables.normed[node].call.items}
        slots = self.stored.slots
        for place in sorted({*terms, *normed}):
            empty = slots.new_empty((slots.shape[1], 1, 1, 1), dtype=self.context.image_dtype)
            mask = empty.bernoulli_(keep) / keep
            if place in normed:
                self.context.masks[place] = mask.to(slots.dtype)
            else:
                with self.context.caller_modes():
                    terms[place] = terms[place] * mask
