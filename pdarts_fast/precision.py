"""What --amp means on a device, and the loss scale that float16 needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

AMPERE = 8
"""Major compute capability of the first NVIDIA GPUs that compute in bfloat16."""


class Precision(NamedTuple):
    """How activations are computed.

    Attributes:
        dtype: Of autocast, or None for float32 throughout.
        scaled: Whether the loss is scaled, so that small float16 gradients do not vanish.
    """

    dtype: torch.dtype | None
    scaled: bool

    def autocast(self, device: torch.device) -> torch.autocast:
        """The region in which a network runs."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype is not None)


FULL = Precision(None, False)


def precision_on(device: torch.device, amp: bool) -> Precision:
    """What --amp means on a device.

    Returns:
        float32 without `amp`; bfloat16 on a CPU and on NVIDIA GPUs since Ampere; float16 with a
        loss scale on older ones, which have no bfloat16 arithmetic.
    """
    if not amp:
        return FULL
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < AMPERE:
        return Precision(torch.float16, True)
    return Precision(torch.bfloat16, False)


class LossScale:
    """Scales a loss so that float16 gradients stay in range; decides on the device, never reads.

    The gradients of ``scale * loss`` are divided by the scale again. If one of them is not finite
    the optimiser skips the step and the scale halves; after `interval` good steps it doubles.

    Attributes:
        scale: float32 scalar.
        growth: int32 scalar, good steps since the scale has changed.
        found_inf: float32 scalar, 1 if the last gradients were not all finite, else 0.

    Source:
        arXiv 1710.03740, section 3.2.
    """

    INITIAL = 65536.0
    SMALLEST = 1.0
    """At this scale gradients overflow by themselves: scaling is not what is wrong."""
    interval = 2000

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.INITIAL, dtype=torch.float32, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def tensors(self) -> list[Tensor]:
        """Everything that changes from step to step."""
        return [self.scale, self.growth, self.found_inf]

    def unscale(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Divide the gradients by the scale, in place.

        Returns:
            `found_inf`, for the optimiser.
        """
        self.found_inf.zero_()
        gradients = [p.grad for p in parameters if p.grad is not None]
        inverse = self.scale.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found_inf, inverse)
        return self.found_inf

    def update(self) -> None:
        """Move the scale after a step, by what `unscale` has found."""
        torch._amp_update_scale_(self.scale, self.growth, self.found_inf, 2.0, 0.5, self.interval)

    def hopeless(self) -> Tensor:
        """bool scalar: the last gradients were not finite, and no smaller scale would help."""
        return (self.found_inf > 0) & (self.scale < self.SMALLEST)

    def state_dict(self) -> dict[str, Any]:
        """The tensors, ready for `torch.save`."""
        return {"scale": self.scale, "growth": self.growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.scale.copy_(state["scale"])
        self.growth.copy_(state["growth"])
