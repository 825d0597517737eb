"""What the public ops share: the check of images, backends and autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def check_images(x: Tensor, name: str) -> None:
    """Refuses what is no image of a dtype that the kernels store.

    Raises:
        ValueError: Names the argument, what it was and what is wanted.
    """
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"{name}: wanted images [N, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name}: wanted {wanted}, got {str(x.dtype).removeprefix('torch.')}")


@torch.compiler.assume_constant_result
def resolve(name: str, device: torch.device, channels: int) -> str:
    """The backend of an op's call, registered.

    Raises:
        UsageError: It does not exist, is not usable, or does not serve the device or channels.
    """
    chosen = backends.resolve(name, device, channels)
    if chosen != backends.REFERENCE:
        backends.load(chosen).register()
    return chosen


def in_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the surrounding autocast region, if there is one."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(kind))
    return x
