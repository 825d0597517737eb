"""The stock module ``model_search``: the supernet, with what DARTS scripts ask of it."""

from __future__ import annotations

from typing import cast

from pdarts_fast import search_space, supernet
from pdarts_fast.genotype import Genotype
from pdarts_fast.supernet import Cell, MixedOp

__all__ = ["Cell", "MixedOp", "Network"]


class Network(supernet.Network):
    """``pdarts_fast.supernet.Network`` with the methods of DARTS and lenient skip dropout."""

    def new(self) -> Network:
        """A fresh network of the same kind, on the same device, with these alphas."""
        made = type(self)(
            self._C,
            self._num_classes,
            self._layers,
            self._criterion,
            self._steps,
            self._multiplier,
            cast(int, self.stem[0].out_channels) // self._C,
            self.switches_normal,
            self.switches_reduce,
            self.p if self.has_skip_dropout else 0.0,
            backend=self._requested_backend,
        ).to(self.classifier.weight.device)
        for mine, other in zip(self.arch_parameters(), made.arch_parameters(), strict=True):
            other.data.copy_(mine.data)
        return made

    def genotype(self) -> Genotype:
        """The two best edges of every node, each with its best operation but ``none``.

        Source: arXiv 1806.09055, section 2.4.
        """
        switches = {"normal": self.switches_normal, "reduce": self.switches_reduce}
        alphas = {
            name: parameter.detach().cpu().float().numpy()
            for name, parameter in zip(switches, self.arch_parameters(), strict=True)
        }
        return search_space.genotype_of(switches, alphas)

    def update_p(self) -> None:
        """Pushes ``p`` down to the dropouts; a network built with ``p=0`` has none."""
        if self.has_skip_dropout:
            super().update_p()
