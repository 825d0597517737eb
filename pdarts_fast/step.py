"""One optimisation step of a search: of the weights, or of the alphas and then the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pdarts_fast.capture.step import Batch
from pdarts_fast.config import SearchConfig
from pdarts_fast.descent import Descent
from pdarts_fast.descent import keep_gradients as keep_gradients
from pdarts_fast.meter import ALPHAS as ALPHAS
from pdarts_fast.meter import WEIGHTS as WEIGHTS
from pdarts_fast.meter import Averages as Averages
from pdarts_fast.meter import Meter as Meter
from pdarts_fast.optimizers import SGD, Adam
from pdarts_fast.precision import Precision, precision_on

if TYPE_CHECKING:
    from pdarts_fast.supernet import Network


class SearchStep(Descent):
    """The bilevel step of one stage: network, optimisers, clipping and running sums.

    The alpha step computes no weight gradients and the weight step no alpha gradients; neither
    is used by the other, so this is exact.

    Args:
        network: The supernet, on `device`.
        config: A validated configuration.
        device: Where batches are.
        alpha_term: What the alpha loss has beside the cross-entropy, a scalar, from the two
            alphas [edges, k]; None for nothing. What it reads may change in place only, so that a
            captured step stays valid. The sums do not hold it.
        precision: How activations are computed; None for what ``config.amp`` means on `device`.

    Source:
        arXiv 1904.12760, section 3.1 (first-order approximation of DARTS).
    """

    def __init__(
        self,
        network: Network,
        config: SearchConfig,
        device: torch.device,
        alpha_term: Callable[[Sequence[Tensor]], Tensor] | None = None,
        *,
        precision: Precision | None = None,
    ) -> None:
        self.network = network
        self.alpha_term = alpha_term
        self.criterion = nn.CrossEntropyLoss().to(device)
        self.weights: list[nn.Parameter] = network.weight_parameters()
        self.alphas: list[nn.Parameter] = network.arch_parameters()
        self.weight_optimizer = SGD(
            self.weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.alpha_optimizer = Adam(
            self.alphas,
            config.alpha_lr,
            betas=config.alpha_betas,
            weight_decay=config.alpha_weight_decay,
        )
        super().__init__(
            network,
            (self.weight_optimizer, self.alpha_optimizer),
            precision or precision_on(device, config.amp),
            config.grad_clip,
            device,
        )

    def set_epoch(self, lr: float, dropout: float) -> None:
        """Learning rate of the weights and skip dropout for the steps that follow."""
        self.weight_optimizer.set_rate(lr)
        self.network.p = dropout
        self.network.update_p()

    def run(self, weights: Batch, alphas: Batch | None, step: int) -> None:
        """One step of a search: of the alphas, if they train, and then of the weights.

        Args:
            weights: Images float [B, 3, H, W] and labels int64 [B] of the weight half.
            alphas: The same of the alpha half, or None while alphas are frozen.
            step: Global step, for `first_bad_step`.
        """
        if alphas is None:
            self._run(self._weight_pass, step, weights)
        else:
            self._run(self._both_passes, step, alphas, weights)

    def weight_step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch in the weights, eagerly or captured; see `run`."""
        self._run(self._weight_pass, step, (images, labels))

    def alpha_step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch in the alphas; arguments as for `weight_step`."""
        self._run(self._alpha_pass, step, (images, labels))

    def state_dict(self) -> dict[str, Any]:
        """Network, dropout state, optimisers and sums, ready for `torch.save`."""
        return {
            "network": self.network.state_dict(),
            "dropout_state": self.network.dropout_state,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            **self._shared_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.network.dropout_state.copy_(state["dropout_state"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self._load_shared_state(state)

    def _weight_pass(self, weights: Batch) -> None:
        self._step(WEIGHTS, *weights)

    def _alpha_pass(self, alphas: Batch) -> None:
        self._step(ALPHAS, *alphas)

    def _both_passes(self, alphas: Batch, weights: Batch) -> None:
        self._step(ALPHAS, *alphas)
        self._step(WEIGHTS, *weights)

    def _step(self, row: int, images: Tensor, labels: Tensor) -> None:
        """The step function: what runs eagerly and what a graph is captured of."""
        trained, frozen, optimizer = (
            (self.weights, self.alphas, self.weight_optimizer)
            if row == WEIGHTS
            else (self.alphas, self.weights, self.alpha_optimizer)
        )
        _require_grad(trained, True)
        _require_grad(frozen, False)
        optimizer.zero_grad(set_to_none=True)
        loss, logits = self.forward(images, labels)
        objective = loss
        if row == ALPHAS and self.alpha_term is not None:
            objective = loss + self.alpha_term(self.alphas)
        norm = self._descend(trained, optimizer, objective)
        self._note(row, loss, norm, logits, labels)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (scalar) and logits [B, classes] of a batch, at least float32."""
        with self.precision.autocast(self.device):
            logits = self.network(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.criterion(logits, labels), logits


def _require_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
