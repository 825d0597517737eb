"""What the public ops share: dtypes, backends, rows of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..cell_operator import backend_named
from ..interface import Backend

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
def resolve(name: str, device: torch.device) -> str:
    """The backend of an op's call, registered.

    Raises:
        UsageError: It does not exist, is not usable, or does not serve the device.
    """
    chosen = backends.resolve(name, device)
    if chosen != backends.REFERENCE:
        backends.load(chosen).register()
    return chosen


def primitives(name: str, dtype: torch.dtype) -> Backend:
    """The primitives of a backend; float64 goes through those of the reference."""
    return backend_named(backends.REFERENCE if dtype == torch.float64 else name)


def in_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the surrounding autocast region, if there is one."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def as_rows(x: Tensor, channels: int) -> Tensor:
    """``[N, C, H, W]`` to contiguous ``[N, H, W, channels]``; no copy if it already is."""
    rows = x.detach().permute(0, 2, 3, 1)
    missing = channels - rows.shape[-1]
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def is_rows(x: Tensor, channels: int) -> bool:
    """Whether ``as_rows`` copies nothing."""
    return x.shape[1] == channels and x.permute(0, 2, 3, 1).is_contiguous()


def as_image(rows: Tensor, channels: int) -> Tensor:
    """``[N, H, W, padded]`` to ``[N, channels, H, W]`` without padding, channels-last."""
    image = rows.permute(0, 3, 1, 2)
    if image.shape[1] == channels:
        return image
    return image[:, :channels].contiguous(memory_format=torch.channels_last)
