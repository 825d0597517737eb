"""Images ``[N, C, H, W]`` as the rows ``[N, H, W, C]`` that primitives read, and back.

C is padded with zeros to what a backend takes. Also what operators over the primitives share: the
dtype they store, when they are needed, and the refusal of second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def storage_dtype(x: Tensor) -> torch.dtype:
    """dtype of the arrays: that of autocast in its region; float16 is computed in float32."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.float32 if dtype == torch.float16 else dtype


def as_rows(x: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """``[N, C, H, W]`` to contiguous ``[N, H, W, channels]``; no copy if it already is."""
    rows = x.detach().to(dtype).permute(0, 2, 3, 1)
    missing = channels - rows.shape[-1]
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def is_rows(x: Tensor, dtype: torch.dtype, channels: int) -> bool:
    """Whether ``as_rows`` copies nothing."""
    rows = x.permute(0, 2, 3, 1)
    return x.dtype == dtype and x.shape[1] == channels and rows.is_contiguous()


def copy_shape(x: Tensor, dtype: torch.dtype, channels: int) -> tuple[int, ...]:
    """Shape of the copy that ``as_rows`` makes; that of nothing if it makes none."""
    return (0,) if is_rows(x, dtype, channels) else (x.shape[0], *x.shape[2:], channels)


def as_image(rows: Tensor | None, like: Tensor) -> Tensor:
    """``[N, H, W, padded]`` to ``like``'s ``[N, C, H, W]`` and dtype; empty for None.

    Args:
        rows: Fresh memory that nobody else uses: it becomes the image.
        like: What the image is a gradient of.
    """
    if rows is None:
        return like.new_empty(0)
    if rows.shape[-1] != like.shape[1]:
        image = rows.to(like.dtype).permute(0, 3, 1, 2)[:, : like.shape[1]]
        return image.contiguous(memory_format=torch.channels_last)
    # In place, since autograd adds to gradients in place unless they are views.
    return rows.to(like.dtype).transpose_(1, 3).transpose_(2, 3)


def fake_image(like: Tensor, wanted: bool) -> Tensor:
    """What ``as_image`` returns, while tracing."""
    if not wanted:
        return like.new_empty(0)
    return like.new_empty((like.shape[0], *like.shape[2:], like.shape[1])).permute(0, 3, 1, 2)


def is_traced(x: Tensor) -> bool:
    """Whether what happens is recorded or transformed: functions must then be operators."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def refuse_second_derivative(backward: Any, subject: str, instead: str) -> None:
    """Makes an operator that computes gradients raise where these are differentiated.

    Args:
        backward: The operator, as ``torch.library.custom_op`` returns it.
        subject: What has no second derivative, with its verb.
        instead: What to do.
    """

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{subject} no second derivative; {instead}")

    backward.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


class _Refusal(torch.autograd.Function):
    """Gradients that raise where they are differentiated by what they follow from."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(tensor.view_as(tensor) for tensor in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)


def attach_refusal(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor], subject: str, instead: str
) -> list[Tensor | None]:
    """Gradients of ``inputs`` that raise as ``refuse_second_derivative`` makes an operator."""
    message = f"{subject} no second derivative; {instead}"
    given = [g for g in grads if g is not None]
    attached = iter(_Refusal.apply(message, len(inputs), *inputs, *given))
    return [None if g is None else next(attached) for g in grads]
