"""The stem of a network on the kernels of a backend: a 3x3 convolution and its BatchNorm.

As one matrix product over patches of the image. Nothing is kept for the backward pass but the
image: the convolution's output is computed anew, which takes less time than memory for it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from . import moments
from .rows import as_image, fake_image, is_traced, refuse_second_derivative, storage_dtype


class StemKernels(Protocol):
    """What a backend gives."""

    def takes(self, channels: int) -> bool:
        """Whether there are kernels for this many output channels."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised array."""
        ...

    def image(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Images ``[N, Cx, H, W]`` as the other methods take them."""
        ...

    def convolve(self, image: Tensor, weight: Tensor, y: Tensor, sums: Tensor) -> None:
        """The convolution.

        Args:
            image: Of ``image``.
            weight: ``[C, Cx, 3, 3]``.
            y: ``[N, H, W, C]``, written.
            sums: Mean and biased variance of y, float64 ``[1, 2, C]``, written.
        """
        ...

    def affine_(self, y: Tensor, scale: Tensor, shift: Tensor) -> None:
        """``y = y * scale + shift`` in place, scale and shift ``[C]``."""
        ...

    def reduce(self, grad: Tensor, y: Tensor, norm: Tensor, sums: Tensor) -> None:
        """Batch sums of ``grad`` and of ``grad * (y * norm[0] + norm[1])``, float64 ``[2, C]``."""
        ...

    def weight_gradient(
        self, image: Tensor, weight: Tensor, y: Tensor, grad: Tensor, coef: Tensor
    ) -> Tensor:
        """Gradient of ``weight`` if that of y is ``coef[0] * grad + coef[1] * y + coef[2]``."""
        ...


_KERNELS: dict[str, StemKernels] = {}
_DTYPES = (torch.float32, torch.bfloat16)


def register(name: str, kernels: StemKernels) -> None:
    """Makes a backend's kernels available to ``run``."""
    _KERNELS[name] = kernels


def is_known_convolution(conv: nn.Conv2d) -> bool:
    """Whether ``run`` takes a convolution: 3x3, stride 1, zero padding 1, without bias."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.bias is None
    )


def serves(backend: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether ``run`` takes these images, dtypes and numbers of channels."""
    kernels = _KERNELS.get(backend)
    return (
        kernels is not None
        and kernels.takes(conv.out_channels)
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        # BatchNorm refuses a single value a channel, in words of its own.
        and x[:, 0].numel() > 1
        and x.dtype == conv.weight.dtype == norm.weight.dtype == torch.float32
        and x.device == conv.weight.device
        and storage_dtype(x) in _DTYPES
    )


def _norm(found: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of the normalisation ``[1, 2, C]``, then of what follows y, ``[C]`` each."""
    norm = moments.normalisation(found)
    scale, shift = norm[0, 0] * gain, norm[0, 1] * gain + bias
    return norm, scale.float(), shift.float()


def forward_pass(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    running: list[Tensor],
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output ``[N, C, H, W]`` of ``dtype``; mean and biased variance, float64 ``[1, 2, C]``.

    Args:
        x: Images ``[N, Cx, H, W]``.
        weight: ``[C, Cx, 3, 3]``.
        gain, bias: Of the BatchNorm, ``[C]``.
        running: Its running mean and variance in evaluation, empty in training.
        backend: A name given to ``register``.
    """
    kernels = _KERNELS[backend]
    images, _, height, width = x.shape
    y = kernels.empty((images, height, width, len(weight)), dtype)
    found = torch.empty(1, 2, len(weight), dtype=torch.float64)
    kernels.convolve(kernels.image(x, dtype), weight, y, found)
    if running:
        found = torch.stack(running)[None].double()
    _, scale, shift = _norm(found, gain, bias)
    kernels.affine_(y, scale, shift)
    return y.permute(0, 3, 1, 2), found


stem_forward = torch.library.custom_op("pdarts_fast::stem_forward", forward_pass, mutates_args=())


@stem_forward.register_fake
def _(x, weight, gain, bias, running, backend, dtype):
    out = x.new_empty((x.shape[0], *x.shape[2:], weight.shape[0]), dtype=dtype)
    return out.permute(0, 3, 1, 2), x.new_empty((1, 2, weight.shape[0]), dtype=torch.float64)


def backward_pass(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    found: Tensor,
    training: bool,
    backend: str,
    want_image: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless wanted), weight, gain and bias.

    Args:
        found: Moments of ``forward_pass``.
    """
    kernels = _KERNELS[backend]
    rows = grad.permute(0, 2, 3, 1).contiguous()
    image = kernels.image(x, grad.dtype)
    y = kernels.empty(tuple(rows.shape), grad.dtype)
    kernels.convolve(image, weight, y, torch.empty_like(found))
    norm = moments.normalisation(found)
    sums = torch.empty(2, len(weight), dtype=torch.float64)
    kernels.reduce(rows, y, norm[0].float(), sums)
    count = rows[..., 0].numel()
    of_norm = (gain, norm, sums[0], sums[1:], count)
    coef = moments.backward_coefficients(*of_norm, training=training)[0].float()
    grad_weight = kernels.weight_gradient(image, weight, y, rows, coef)
    grad_x = x.new_empty(0)
    if want_image:
        dy = (coef[0] * rows + coef[1] * y + coef[2]).to(x.dtype).permute(0, 3, 1, 2)
        grad_x = conv2d_input(x.shape, weight.to(x.dtype), dy, padding=1)
        grad_x = as_image(grad_x.permute(0, 2, 3, 1).contiguous(), x)
    return grad_x, grad_weight, sums[1].to(gain.dtype), sums[0].to(gain.dtype)


stem_backward = torch.library.custom_op(
    "pdarts_fast::stem_backward", backward_pass, mutates_args=()
)


@stem_backward.register_fake
def _(grad, x, weight, gain, found, training, backend, want_image):
    image = fake_image(x, want_image)
    return image, torch.empty_like(weight), torch.empty_like(gain), torch.empty_like(gain)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, gain, _, running, backend, _ = inputs
    ctx.save_for_backward(x, weight, gain, output[1])
    ctx.training, ctx.backend = not running, backend
    ctx.num_running = len(running)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, run: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients of image, weight, gain and bias by ``backward_pass`` or the operator of it."""
    want_image, *wants = ctx.needs_input_grad[:4]
    x, weight, gain, found = ctx.saved_tensors
    grads = run(grad, x, weight, gain, found, ctx.training, ctx.backend, want_image)
    return [g if want else None for g, want in zip(grads, (want_image, *wants), strict=True)]


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    grads = _gradients(ctx, torch.ops.pdarts_fast.stem_backward, grad)
    return (*grads, [None] * ctx.num_running, None, None)


stem_forward.register_autograd(_backward, setup_context=_keep)
refuse_second_derivative(
    stem_backward,
    "the fused stem has",
    "build the network with backend='reference' to differentiate its gradients",
)


class EagerStem(torch.autograd.Function):
    """The operator outside of traces, where it costs half a millisecond of Python."""

    @staticmethod
    def forward(ctx, *inputs):
        """Output and moments of ``forward_pass``."""
        output = forward_pass(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, _):
        """Gradients; the operator refuses to be differentiated where that is asked for."""
        run = torch.ops.pdarts_fast.stem_backward if torch.is_grad_enabled() else backward_pass
        return (*_gradients(ctx, run, grad), None, None, None)


def run(backend: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What ``norm(conv(x))`` returns, channels-last in memory; moves the running statistics.

    Args:
        backend: A name given to ``register``, which ``serves`` these.
        conv: As ``is_known_convolution`` wants it.
        norm: With scale, shift and running statistics; eps and momentum of ``moments``.
        x: Images ``[N, Cx, H, W]``.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    running = [] if norm.training else [mean, variance]
    inputs = (x, conv.weight, norm.weight, norm.bias, running, backend, storage_dtype(x))
    call = torch.ops.pdarts_fast.stem_forward if is_traced(x) else EagerStem.apply
    out, found = call(*inputs)
    if norm.training:
        with torch.no_grad():
            count = x.shape[0] * x.shape[2] * x.shape[3]
            targets = found[0, 0], moments.unbiased(found[0, 1], count)
            for average, target in zip((mean, variance), targets, strict=True):
                average.lerp_(target.to(average.dtype), moments.MOMENTUM)
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
    return out
