"""One optimisation step of a derived network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.network import NetworkCIFAR, NetworkImageNet
from pdarts_fast.step import WEIGHTS, Meter, keep_gradients
from pdarts_fast.train_config import TrainConfig


class TrainStep:
    """Network, optimiser, clipping and running sums of a training run.

    The loss is the cross-entropy (with label smoothing, if any) of the network plus
    ``auxiliary_weight`` times that of its auxiliary head.

    Args:
        network: The network, on `device`.
        config: A validated configuration.
        device: Where batches are.

    Attributes:
        average_gradients: Called with the parameters between backward and clipping; several ranks
            make their mean there.
        first_bad_step: int64 scalar on the device; global step of the first loss or gradient norm
            that was not finite, -1 while there is none.

    Source:
        arXiv 1904.12760, sections 4.2.2 and 4.3.
    """

    def __init__(
        self, network: NetworkCIFAR | NetworkImageNet, config: TrainConfig, device: torch.device
    ) -> None:
        self.network = network
        self.average_gradients: Callable[[Iterable[nn.Parameter]], None] = keep_gradients
        self.device = device
        self.amp = config.amp
        self.grad_clip = config.grad_clip
        self.auxiliary_weight = config.auxiliary_weight
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        network.to(memory_format=self.memory_format)
        self.epoch_meter = Meter(device)
        self.interval_meter = Meter(device)
        self._last_step = -1
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def set_epoch(self, lr: float, drop_path: float) -> None:
        """Learning rate and drop-path probability for the steps that follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.network.drop_path_prob = drop_path

    def run(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch.

        Args:
            images: float [B, 3, H, W].
            labels: int64 [B].
            step: Global step, for `first_bad_step`.
        """
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            logits, logits_aux = self.network(images)
        logits = logits.float()
        loss = self.criterion(logits, labels)
        if logits_aux is not None:
            loss = loss + self.auxiliary_weight * self.criterion(logits_aux.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        for meter in (self.epoch_meter, self.interval_meter):
            meter.add(WEIGHTS, loss, logits, labels)
        # A norm that is not finite ruins the parameters although the loss still was a number.
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        bad = ~finite & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, step)
        self._last_step = step

    def bad_step(self) -> int:
        """Global step at which numbers stopped being finite, -1 if all are; waits for the device.

        Also looks at the weights and statistics themselves: an update can overflow although loss
        and gradient were finite.
        """
        bad = int(self.first_bad_step)
        values = self.network.state_dict().values()
        if bad < 0 and not all(bool(torch.isfinite(value).all()) for value in values):
            return self._last_step
        return bad

    def state_dict(self) -> dict[str, Any]:
        """Network, optimiser and sums, ready for `torch.save`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch_sums": self.epoch_meter.sums,
            "interval_sums": self.interval_meter.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch_meter.sums.copy_(state["epoch_sums"])
        self.interval_meter.sums.copy_(state["interval_sums"])
