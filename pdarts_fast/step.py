"""One optimisation step of a search: of the weights or of the alphas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pdarts_fast.config import SearchConfig

if TYPE_CHECKING:
    from pdarts_fast.supernet import Network

# Rows and columns of the sums that a step adds to.
WEIGHTS, ALPHAS = 0, 1
LOSS, CORRECT, IMAGES = 0, 1, 2


class Averages(NamedTuple):
    """Mean loss and accuracy over some images, or None where there were none."""

    loss: float | None
    accuracy: float | None
    images: int


class Meter:
    """Sums of loss, correct answers and images, kept on the device until they are read.

    Attributes:
        sums: float64 [2, 3], rows WEIGHTS and ALPHAS, columns LOSS, CORRECT and IMAGES.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=device)

    def add(self, row: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean loss (scalar), logits [B, classes] and labels int64 [B]."""
        count = labels.shape[0]
        self.sums[row, LOSS] += loss.detach().double() * count
        self.sums[row, CORRECT] += (logits.detach().argmax(1) == labels).sum()
        self.sums[row, IMAGES] += count

    def read(self) -> tuple[Averages, Averages]:
        """Means of both rows; waits for the device."""
        weights, alphas = (_average(row) for row in self.sums.tolist())
        return weights, alphas

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()


def _average(row: list[float]) -> Averages:
    images = int(row[IMAGES])
    if not images:
        return Averages(None, None, 0)
    return Averages(row[LOSS] / images, row[CORRECT] / images, images)


class SearchStep:
    """The bilevel step of one stage: network, optimisers, clipping and running sums.

    The alpha step computes no weight gradients and the weight step no alpha gradients; neither
    is used by the other, so this is exact.

    Args:
        alpha_term: What the alpha loss has beside the cross-entropy, a scalar, from the two
            alphas [edges, k]; None for nothing. What it reads may change in place only, so that a
            captured step stays valid. The sums do not hold it.

    Attributes:
        first_bad_step: int64 scalar on the device; global step of the first loss or gradient norm
            that was not finite, -1 while there is none.

    Source:
        arXiv 1904.12760, section 3.1 (first-order approximation of DARTS).
    """

    def __init__(
        self,
        network: Network,
        config: SearchConfig,
        device: torch.device,
        alpha_term: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.network = network
        self.alpha_term = alpha_term
        self.criterion = nn.CrossEntropyLoss().to(device)
        self.grad_clip = config.grad_clip
        self.amp = config.amp
        self.device = device
        self.weights: list[nn.Parameter] = network.weight_parameters()
        self.alphas: list[nn.Parameter] = network.arch_parameters()
        self.weight_optimizer = torch.optim.SGD(
            self.weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas,
            config.alpha_lr,
            betas=config.alpha_betas,
            weight_decay=config.alpha_weight_decay,
        )
        self.epoch_meter = Meter(device)
        self.interval_meter = Meter(device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def set_epoch(self, lr: float, dropout: float) -> None:
        """Learning rate of the weights and skip dropout for the steps that follow."""
        for group in self.weight_optimizer.param_groups:
            group["lr"] = lr
        self.network.p = dropout
        self.network.update_p()

    def weight_step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch in the weights.

        Args:
            images: float [B, 3, H, W].
            labels: int64 [B].
            step: Global step, for `first_bad_step`.
        """
        self._step(WEIGHTS, images, labels, step)

    def alpha_step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch in the alphas; arguments as for `weight_step`."""
        self._step(ALPHAS, images, labels, step)

    def state_dict(self) -> dict[str, Any]:
        """Network, dropout state, optimisers and sums, ready for `torch.save`."""
        return {
            "network": self.network.state_dict(),
            "dropout_state": self.network.dropout_state,
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "epoch_sums": self.epoch_meter.sums,
            "interval_sums": self.interval_meter.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.network.dropout_state.copy_(state["dropout_state"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        self.epoch_meter.sums.copy_(state["epoch_sums"])
        self.interval_meter.sums.copy_(state["interval_sums"])

    def _step(self, row: int, images: Tensor, labels: Tensor, step: int) -> None:
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
        objective.backward()
        norm = nn.utils.clip_grad_norm_(trained, self.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for meter in (self.epoch_meter, self.interval_meter):
            meter.add(row, loss, logits, labels)
        # A norm that is not finite ruins the parameters although the loss still was a number.
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        bad = ~finite & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, step)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (scalar) and logits [B, classes] of a batch, at least float32."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            logits = self.network(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.criterion(logits, labels), logits


def _require_grad(parameters: Iterable[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
