"""What a search asks its strategy: the plain answers are those of P-DARTS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pdarts_fast import schedule, search_space
from pdarts_fast.config import SearchConfig
from pdarts_fast.distributed import Ranks
from pdarts_fast.search_space import Alphas, Derivation, Switches
from pdarts_fast.strategies.beta_decay import BetaDecay, beta_weight
from pdarts_fast.strategies.dirichlet import DirichletMixing
from pdarts_fast.supernet import Network

Record = dict[str, Any]
AlphaTerm = Callable[[Sequence[Tensor]], Tensor]


class Trainer(Protocol):
    """What a strategy may use of the stage in training when an epoch begins."""

    @property
    def network(self) -> Network:
        """The supernet."""

    @property
    def weight_optimizer(self) -> torch.optim.Optimizer:
        """Optimiser of the weights."""

    @property
    def alpha_optimizer(self) -> torch.optim.Optimizer:
        """Optimiser of the alphas."""

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (scalar) and logits of a batch."""


@dataclass(frozen=True)
class Trials:
    """What a strategy measures a supernet with, together with the other ranks of the search.

    Attributes:
        batches: ``batches(n)``: pass n over the augmented weight half. Gives images, labels and how
            many of them, the first ones, count; the others are another rank's too.
        ranks: The processes that see a part of each batch.
        check_stop: To call after every batch; raises if the search was asked to stop.
    """

    batches: Callable[[int], Iterator[tuple[Tensor, Tensor, int]]]
    ranks: Ranks
    check_stop: Callable[[], None]


@dataclass
class Result:
    """What a search ends in.

    Attributes:
        derivation: Genotypes, with ``restricted`` as they go into genotype.json.
        facts: Further entries of genotype.json.
    """

    derivation: Derivation
    facts: dict[str, Any] = field(default_factory=dict)


class Strategy:
    """P-DARTS: every answer that a subclass may give differently.

    Args:
        config: A validated configuration.
        device: Where the supernet runs.

    Attributes:
        alpha_term: What the alpha loss of the current stage has beside the cross-entropy, or None.
    """

    def __init__(self, config: SearchConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.alpha_term: AlphaTerm | None = None
        self._beta: BetaDecay | None = None

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of the weights in an epoch (0-based) of a stage."""
        return schedule.learning_rate(self.config, epoch)

    def skip_dropout(self, stage: int, epoch: int) -> float:
        """Dropout probability after identity skips in an epoch of a stage (both 0-based)."""
        return schedule.skip_dropout(self.config, stage, epoch)

    def start_stage(self, network: Network, switches: Switches, *, resumed: bool) -> None:
        """Set up the network of a stage and ``alpha_term`` before the first step.

        Args:
            network: On its device; on a resume its checkpoint is loaded afterwards.
            switches: Live ops.
            resumed: Whether the stage goes on from a checkpoint.
        """
        if self.config.sample == "dirichlet":
            network.mixing = DirichletMixing().to(self.device)
        terms = self._terms(network, switches)
        self.alpha_term = _Sum(terms) if terms else None

    def _terms(self, network: Network, switches: Switches) -> list[AlphaTerm]:
        """The terms of the alpha loss in a stage."""
        self._beta = None
        if not self.config.beta_decay:
            return []
        self._beta = BetaDecay(self._active_columns(network)).to(self.device)
        return [self._beta]

    def _active_columns(self, network: Network) -> Tensor | None:
        """bool [k] of alpha columns that count, or None for all."""
        return None

    def begin_epoch(self, epoch: int, trainer: Trainer, trials: Trials) -> Iterator[Record]:
        """Change the supernet where an epoch begins, before its first step.

        In place, and nothing that the host decides in a step: captured steps go on as they are.

        Args:
            epoch: 0-based epoch of the stage.
            trainer: The stage in training.
            trials: What it may be measured with.

        Yields:
            Records for metrics.jsonl without stage, epoch and step.
        """
        yield from ()

    def set_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch in ``alpha_term``, in place; also after a resume."""
        if self._beta is not None:
            warmup = self.config.warmup_epochs
            epochs = self.config.epochs - warmup
            self._beta.weight.fill_(beta_weight(self.config.beta_decay, epoch - warmup, epochs))

    def end_epoch(self, switches: Switches, alphas: dict[str, np.ndarray]) -> Iterator[Record]:
        """Look at the alphas when an epoch has ended.

        Args:
            switches: Live ops of the stage.
            alphas: float32 [14, live ops] per cell type.

        Yields:
            Records for metrics.jsonl without stage, epoch and step.
        """
        yield from ()

    def visible(
        self, switches: Switches, alphas: dict[str, np.ndarray]
    ) -> tuple[Switches, dict[str, np.ndarray]]:
        """The live ops, and the alphas that belong to them, to be logged."""
        return switches, alphas

    def result(self, finished: Sequence[Alphas]) -> Result:
        """Derive the result from the alphas at the end of all stages."""
        return Result(search_space.derive(finished))

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: numbers, texts, lists and dicts of such."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; before ``start_stage``."""


class _Sum:
    """Sum of several terms of the alpha loss."""

    def __init__(self, terms: Sequence[AlphaTerm]) -> None:
        self._terms = terms

    def __call__(self, alphas: Sequence[Tensor]) -> Tensor:
        total = self._terms[0](alphas)
        for term in self._terms[1:]:
            total = total + term(alphas)
        return total
