"""One optimisation step of a derived network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.capture.step import Batch
from pdarts_fast.descent import Descent, all_finite
from pdarts_fast.meter import WEIGHTS
from pdarts_fast.network import NetworkCIFAR, NetworkImageNet
from pdarts_fast.optimizers import SGD
from pdarts_fast.precision import Precision, precision_on
from pdarts_fast.train_config import TrainConfig


class TrainStep(Descent):
    """Network, optimiser, clipping and running sums of a training run.

    The loss is the cross-entropy (with label smoothing, if any) of the network plus
    ``auxiliary_weight`` times that of its auxiliary head.

    Args:
        network: The network, on `device`.
        config: A validated configuration.
        device: Where batches are.
        precision: How activations are computed; None for what ``config.amp`` means on `device`.
        tensor_drop_path: Whether the drop-path probability is a tensor, which a captured step
            needs; None for on CUDA. Masks of a number and of a tensor are drawn differently.

    Source:
        arXiv 1904.12760, sections 4.2.2 and 4.3.
    """

    def __init__(
        self,
        network: NetworkCIFAR | NetworkImageNet,
        config: TrainConfig,
        device: torch.device,
        *,
        precision: Precision | None = None,
        tensor_drop_path: bool | None = None,
    ) -> None:
        self.network = network
        self.auxiliary_weight = config.auxiliary_weight
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.parameters = list(network.parameters())
        self.optimizer = SGD(
            self.parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        network.to(memory_format=self.memory_format)
        in_tensor = device.type == "cuda" if tensor_drop_path is None else tensor_drop_path
        # A run without drop-path has none in its graph either.
        drops = in_tensor and config.drop_path > 0
        self._drop_path = torch.zeros((), device=device) if drops else None
        self._last_step = -1
        super().__init__(
            network,
            (self.optimizer,),
            precision or precision_on(device, config.amp),
            config.grad_clip,
            device,
        )

    def set_epoch(self, lr: float, drop_path: float) -> None:
        """Learning rate and drop-path probability for the steps that follow."""
        self.optimizer.set_rate(lr)
        if self._drop_path is None:
            self.network.drop_path_prob = drop_path
        else:
            self.network.drop_path_prob = self._drop_path.fill_(drop_path)

    def run(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Descend the loss of a batch, eagerly or from a captured graph.

        Args:
            images: float [B, 3, H, W].
            labels: int64 [B].
            step: Global step, for `first_bad_step`.
        """
        self._run(self._step, step, (images.contiguous(memory_format=self.memory_format), labels))
        self._last_step = step

    def _step(self, batch: Batch) -> None:
        """The step function: what runs eagerly and what a graph is captured of."""
        images, labels = batch
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast(self.device):
            logits, logits_aux = self.network(images)
        logits = logits.float()
        loss = self.criterion(logits, labels)
        if logits_aux is not None:
            loss = loss + self.auxiliary_weight * self.criterion(logits_aux.float(), labels)
        norm = self._descend(self.parameters, self.optimizer, loss)
        self._note(WEIGHTS, loss, norm, logits, labels)

    def bad_step(self) -> int:
        """Global step at which numbers stopped being finite, -1 if all are; waits for the device.

        Also looks at the weights and statistics themselves: an update can overflow although loss
        and gradient were finite.
        """
        finite = all_finite(self.network.state_dict().values())
        bad, good = torch.stack([self.first_bad_step, finite.to(torch.int64)]).tolist()
        return self._last_step if bad < 0 and not good else bad

    def state_dict(self) -> dict[str, Any]:
        """Network, optimiser and sums, ready for `torch.save`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self._shared_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_shared_state(state)
