"""SGD and Adam whose learning rate is a tensor on the device, so that a step can be captured.

The arithmetic is torch's own. On CUDA it is the fused kernels, which read the learning rate and
the overflow flag where they lie. Elsewhere it is torch's plain loop over the parameters, bit for
bit what `torch.optim.SGD` and `torch.optim.Adam` compute by default; it runs as one operator,
inside which reading the two numbers costs nothing, so that a trace of a step has no host read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class _TensorRate(torch.optim.Optimizer):
    """What both optimisers share: one group, its learning rate a tensor that stays in place.

    Attributes:
        lr: Scalar on the device: float32 where a fused kernel reads it, else float64.
        fused: Whether the fused kernels run.
    """

    lr: Tensor
    fused: bool

    def _place_rate(self, lr: float, fused: bool | None) -> None:
        (group,) = self.param_groups
        device = group["params"][0].device
        self.fused = device.type == "cuda" if fused is None else fused
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.lr = torch.full((), lr, dtype=dtype, device=device)
        group["lr"] = self.lr

    def set_rate(self, lr: float) -> None:
        """Write a new learning rate where a captured graph finds it."""
        self.lr.fill_(lr)

    def prepare(self) -> None:
        """Make the state of every parameter that has none, at the place where it will stay."""
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                self.state[parameter] = self._fresh_state(parameter)

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All state that an update changes."""
        values = (value for state in self.state.values() for value in state.values())
        return [value for value in values if isinstance(value, Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """As that of torch's own optimiser, with the learning rate as a number."""
        state = super().state_dict()
        state["param_groups"] = [g | {"lr": float(self.lr)} for g in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        (group,) = self.param_groups
        self.set_rate(float(group["lr"]))
        group["lr"] = self.lr

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that have a gradient, with their state made."""
        parameters = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self._fresh_state(parameter)
        return parameters


class SGD(_TensorRate, torch.optim.SGD):
    """SGD with momentum and weight decay; see the module.

    Args:
        parameters: What it trains, all on one device.
        lr: Learning rate to begin with.
        momentum: Momentum.
        weight_decay: Weight decay, added to the gradient.
        fused: Whether to run the fused kernel; None for on CUDA only.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float,
        weight_decay: float,
        fused: bool | None = None,
    ) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay)
        self._place_rate(lr, fused)

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        # A buffer of zeros gives the first step that torch takes without one.
        wanted = self.param_groups[0]["momentum"] != 0
        return {"momentum_buffer": torch.zeros_like(parameter.detach()) if wanted else None}

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Descend along the gradients.

        Args:
            found_inf: float32 scalar on the device; 1 keeps everything as it is. None for 0.
        """
        group, trained = self.param_groups[0], self._trained()
        gradients = [p.grad for p in trained if p.grad is not None]
        momentum, decay = group["momentum"], group["weight_decay"]
        buffers = [self.state[p]["momentum_buffer"] for p in trained] if momentum else []
        if not self.fused:
            torch.ops.pdarts_fast.sgd_(
                trained, gradients, buffers, self.lr, found_inf, momentum, decay
            )
            return
        sgd(
            list(trained),
            gradients,
            buffers or [None] * len(trained),
            fused=True,
            found_inf=found_inf,
            weight_decay=decay,
            momentum=momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Adam(_TensorRate, torch.optim.Adam):
    """Adam with weight decay in the gradient; see the module.

    Args:
        parameters: What it trains, all on one device.
        lr: Learning rate.
        betas: Decay of the two moments.
        weight_decay: Weight decay, added to the gradient.
        fused: Whether to run the fused kernel; None for on CUDA only.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        fused: bool | None = None,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, weight_decay=weight_decay)
        self._place_rate(lr, fused)

    def _fresh_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=self.lr.device),
            "exp_avg": torch.zeros_like(parameter.detach()),
            "exp_avg_sq": torch.zeros_like(parameter.detach()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].to(self.lr.device)

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Descend along the gradients; `found_inf` as in `SGD.update`."""
        group, trained = self.param_groups[0], self._trained()
        gradients = [p.grad for p in trained if p.grad is not None]
        averages, squares, steps = (
            [self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        (beta1, beta2), decay, eps = group["betas"], group["weight_decay"], group["eps"]
        if not self.fused:
            torch.ops.pdarts_fast.adam_(
                trained, gradients, averages, squares, steps, self.lr, found_inf,
                beta1, beta2, decay, eps,
            )  # fmt: skip
            return
        adam(
            list(trained), gradients, averages, squares, [], steps,
            fused=True, found_inf=found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=self.lr, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip


def _skips(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(found_inf)


@torch.library.custom_op("pdarts_fast::sgd_", mutates_args=("parameters", "buffers"))
def _sgd(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    lr: Tensor,
    found_inf: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> None:
    if not _skips(found_inf):
        sgd(
            parameters, gradients, list(buffers) or [None] * len(parameters),
            foreach=False, fused=False, weight_decay=weight_decay, momentum=momentum,
            lr=float(lr), dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


@_sgd.register_fake
def _(parameters, gradients, buffers, lr, found_inf, momentum, weight_decay):
    return None


@torch.library.custom_op(
    "pdarts_fast::adam_", mutates_args=("parameters", "averages", "squares", "steps")
)
def _adam(
    parameters: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    if not _skips(found_inf):
        adam(
            parameters, gradients, averages, squares, [], steps,
            foreach=False, fused=False, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=float(lr), weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip


@_adam.register_fake
def _(
    parameters, gradients, averages, squares, steps, lr, found_inf, beta1, beta2, weight_decay, eps
):
    return None
