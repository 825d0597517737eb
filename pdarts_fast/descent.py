"""What every optimisation step does once it has a loss, with nothing read from the device.

Whatever differs from one step to the next lies in tensors that stay in place (learning rates, the
step's number, dropout and loss scale, sums), so that the same code runs eagerly and captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.capture.step import Batch, StepGraphs
from pdarts_fast.capture.types import Capture
from pdarts_fast.meter import Meter
from pdarts_fast.optimizers import SGD, Adam
from pdarts_fast.precision import LossScale, Precision


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """What a step of one process does to its gradients before clipping: nothing."""


class Descent:
    """Base of the steps: backward, clipping, optimiser, sums and the watch for infinities.

    Args:
        network: What is trained, on `device`.
        optimizers: All optimisers of the step.
        precision: How activations are computed.
        grad_clip: Largest norm of the gradients of a loss.
        device: Where batches are.

    Attributes:
        average_gradients: Called with the trained parameters between backward and clipping;
            several ranks make their mean there. Gradients are still multiplied by the loss scale.
        number: int64 scalar on the device, the global step.
        first_bad_step: int64 scalar on the device; global step of the first loss or gradient norm
            that was not finite, -1 while there is none. With a loss scale a gradient that is not
            finite skips a step and counts only once no smaller scale would help.
        scale: Loss scale, or None where the precision needs none.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizers: Sequence[SGD | Adam],
        precision: Precision,
        grad_clip: float,
        device: torch.device,
    ) -> None:
        self.module = network
        self.optimizers = optimizers
        self.precision = precision
        self.grad_clip = grad_clip
        self.device = device
        self.average_gradients: Callable[[Iterable[nn.Parameter]], None] = keep_gradients
        self.scale = LossScale(device) if precision.scaled else None
        self.epoch_meter = Meter(device)
        self.interval_meter = Meter(device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._graphs: StepGraphs | None = None

    def capture_with(self, capture: Capture | None) -> None:
        """Run the steps that follow from captured graphs; None runs them eagerly."""
        self.close()
        self._graphs = None if capture is None else StepGraphs(self, capture)

    def close(self) -> None:
        """Release the captured graphs and their memory, if there are any."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    def invalidate(self) -> None:
        """Record all graphs anew: tensors, or what the host decides in a step, have changed."""
        if self._graphs is not None:
            self._graphs.close()

    def bad_step(self) -> int:
        """First global step whose numbers were not finite, -1 if all are; waits for the device."""
        return int(self.first_bad_step)

    def prepare(self) -> None:
        """Make all state that the first step would make, at the place where it stays."""
        for optimizer in self.optimizers:
            optimizer.prepare()

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that a step may change in place, once each."""
        return [
            *self.module.parameters(),
            *self.module.buffers(),
            *(tensor for optimizer in self.optimizers for tensor in optimizer.tensors()),
            *(self.scale.tensors() if self.scale is not None else ()),
            self.epoch_meter.sums,
            self.interval_meter.sums,
            self.first_bad_step,
        ]

    def clear_gradients(self) -> None:
        """Drop every gradient, also what an interrupted step has left."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def _run(self, function: Callable[..., None], number: int, *batches: Batch) -> None:
        """Call a function of batches, eagerly or from its graph, as global step `number`."""
        self.number.fill_(number)
        if self._graphs is None:
            function(*batches)
        else:
            self._graphs.run(function, batches)

    def _descend(
        self, trained: Sequence[nn.Parameter], optimizer: SGD | Adam, objective: Tensor
    ) -> Tensor:
        """Backward, clipping and optimiser; returns the norm of the gradients, a scalar."""
        (objective if self.scale is None else objective * self.scale.scale).backward()
        self.average_gradients(trained)
        found_inf = None if self.scale is None else self.scale.unscale(trained)
        norm = nn.utils.clip_grad_norm_(trained, self.grad_clip)
        optimizer.update(found_inf)
        optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.update()
        return norm

    def _note(self, row: int, loss: Tensor, norm: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch to the sums, and remember the first step that was not finite."""
        for meter in (self.epoch_meter, self.interval_meter):
            meter.add(row, loss, logits, labels)
        # A norm that is not finite ruins the parameters although the loss still was a number.
        ruined = ~torch.isfinite(norm) if self.scale is None else self.scale.hopeless()
        bad = (ruined | ~torch.isfinite(loss.detach())) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, self.number, self.first_bad_step))

    def _shared_state(self) -> dict[str, Any]:
        """What the state dictionaries of all steps hold."""
        state = {"epoch_sums": self.epoch_meter.sums, "interval_sums": self.interval_meter.sums}
        return state if self.scale is None else state | {"scale": self.scale.state_dict()}

    def _load_shared_state(self, state: dict[str, Any]) -> None:
        # Optimisers hold other tensors after loading than those that a graph knows.
        self.invalidate()
        self.epoch_meter.sums.copy_(state["epoch_sums"])
        self.interval_meter.sums.copy_(state["interval_sums"])
        # A run that goes on on another device may have had no scale, or have none now.
        if self.scale is not None and "scale" in state:
            self.scale.load_state_dict(state["scale"])


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """bool scalar on the device: whether every element of every tensor is finite."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()
