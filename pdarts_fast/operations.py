"""The primitives of the search space as torch modules, under their stock parameter names.

Every module maps ``[N, C, H, W]`` to ``[N, C_out, ceil(H / stride), ceil(W / stride)]``. No
convolution has a bias. ``affine`` says whether BatchNorm layers have a scale and a shift: no in
the supernet, yes in derived networks.

Source: arXiv 1904.12760, section 4.1 (search space), and arXiv 1806.09055, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_MOMENTUM = 0.1
BN_EPS = 1e-5


def batch_norm(channels: int, affine: bool) -> nn.BatchNorm2d:
    """BatchNorm with running statistics, momentum 0.1 and eps 1e-5."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM, affine=affine)


class ReLUConvBN(nn.Module):
    """``BN(conv(relu(x)))``: how a cell brings its two inputs to its own channel count.

    Args:
        C_in: Channels of the input.
        C_out: Channels of the output.
        kernel_size: Side of the convolution kernel.
        stride: Stride of the convolution.
        padding: Zero padding of the convolution.
        affine: Whether BatchNorm has a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            batch_norm(C_out, affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _separable(
    C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, dilation: int, affine: bool
) -> list[nn.Module]:
    """The four layers ReLU, depthwise k×k, pointwise, BN."""
    depthwise = nn.Conv2d(
        C_in,
        C_in,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=C_in,
        bias=False,
    )
    pointwise = nn.Conv2d(C_in, C_out, 1, bias=False)
    return [nn.ReLU(), depthwise, pointwise, batch_norm(C_out, affine)]


class DilConv(nn.Module):
    """Dilated separable convolution: ``BN(pointwise(depthwise(relu(x))))``.

    Args:
        C_in: Channels of the input.
        C_out: Channels of the output.
        kernel_size: Side of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        padding: Zero padding of the depthwise convolution.
        dilation: Dilation of the depthwise convolution.
        affine: Whether BatchNorm has a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            *_separable(C_in, C_out, kernel_size, stride, padding, dilation, affine)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    """Separable convolution, applied twice; only the first one has the stride.

    Args:
        C_in: Channels of the input.
        C_out: Channels of the output.
        kernel_size: Side of both depthwise kernels.
        stride: Stride of the first depthwise convolution.
        padding: Zero padding of both depthwise convolutions.
        affine: Whether BatchNorm has a scale and a shift.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        kernel_size: int,
        stride: int,
        padding: int,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            *_separable(C_in, C_in, kernel_size, stride, padding, 1, affine),
            *_separable(C_in, C_out, kernel_size, 1, padding, 1, affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Identity(nn.Module):
    """``x``: a skip connection at stride 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """Zeros of the size the other primitives would give at this stride.

    Args:
        stride: Every ``stride``-th row and column is kept.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class FactorizedReduce(nn.Module):
    """Halves height and width by two pixel-shifted 1×1 convolutions: a skip at stride 2.

    ``BN(cat(conv_1(r), conv_2(shift(r))))`` with ``r = relu(x)``; both convolutions have stride 2
    and ``shift`` moves the image by one pixel up and left, so together they see pixels of even and
    of odd coordinates. The row (column) that the shift brings in is zero; it is read only if the
    height (width) is odd, and makes both halves ``ceil(H / 2) × ceil(W / 2)`` there.

    Args:
        C_in: Channels of the input.
        C_out: Channels of the output, at least 2; ``conv_1`` gives ``C_out // 2`` of them.
        affine: Whether BatchNorm has a scale and a shift.

    Raises:
        ValueError: ``C_out`` is below 2.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True) -> None:
        super().__init__()
        if C_out < 2:
            raise ValueError(f"a factorized reduce splits its channels: C_out >= 2, got {C_out}")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, stride=2, bias=False)
        self.bn = batch_norm(C_out, affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        shifted = x[:, :, 1:, 1:]
        odd_height, odd_width = x.shape[2] % 2, x.shape[3] % 2
        if odd_height or odd_width:
            shifted = F.pad(shifted, (0, odd_width, 0, odd_height))
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))


def _pool(kind: str, stride: int) -> nn.Module:
    """3×3 pooling with padding 1; the average counts only pixels of the image."""
    if kind == "max":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


def _skip(C: int, stride: int, affine: bool) -> nn.Module:
    return Identity() if stride == 1 else FactorizedReduce(C, C, affine)


def _sep(kernel_size: int) -> Callable[[int, int, bool], nn.Module]:
    padding = kernel_size // 2
    return lambda C, stride, affine: SepConv(C, C, kernel_size, stride, padding, affine)


def _dil(kernel_size: int) -> Callable[[int, int, bool], nn.Module]:
    padding = kernel_size - 1
    return lambda C, stride, affine: DilConv(C, C, kernel_size, stride, padding, 2, affine)


def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    """ReLU, 1×7 convolution, 7×1 convolution, BN; each convolution strides along its own axis.

    Source: arXiv 1707.07012 (NASNet), section 3.
    """
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
        batch_norm(C, affine),
    )


OPS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: _pool("max", stride),
    "avg_pool_3x3": lambda C, stride, affine: _pool("avg", stride),
    "skip_connect": _skip,
    "sep_conv_3x3": _sep(3),
    "sep_conv_5x5": _sep(5),
    "sep_conv_7x7": _sep(7),
    "dil_conv_3x3": _dil(3),
    "dil_conv_5x5": _dil(5),
    "conv_7x1_1x7": _conv_7x1_1x7,
}
"""Primitive name to ``build(C, stride, affine)``; channels stay the same."""
