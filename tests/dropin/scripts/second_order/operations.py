# Written as scripts of the field are.

"""Candidate operations of a search in the style of DARTS."""

import torch
import torch.nn as nn


def separable(C, kernel, stride, dilation):
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(inplace=False),
        nn.Conv2d(C, C, kernel, stride, padding, dilation=dilation, groups=C, bias=False),
        nn.Conv2d(C, C, kernel_size=1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    ]


class Separable(nn.Module):
    def __init__(self, C, kernel, stride):
        super().__init__()
        self.body = nn.Sequential(*separable(C, kernel, stride, 1), *separable(C, kernel, 1, 1))

    def forward(self, x):
        return self.body(x)


class Dilated(nn.Module):
    def __init__(self, C, kernel, stride):
        super().__init__()
        self.body = nn.Sequential(*separable(C, kernel, stride, 2))

    def forward(self, x):
        return self.body(x)


class Nothing(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.step = stride

    def forward(self, x):
        return x[:, :, :: self.step, :: self.step] * 0.0


class Same(nn.Module):
    def forward(self, x):
        return x


class Halve(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.act = nn.ReLU()
        self.even = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(C_in, C_out - C_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x):
        x = self.act(x)
        return self.norm(torch.cat((self.even(x), self.odd(x[:, :, 1:, 1:])), 1))


class Squeeze(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=False)
        )

    def forward(self, x):
        return self.body(x)


OPS = {
    "none": lambda C, stride: Nothing(stride),
    "max_pool_3x3": lambda C, stride: nn.MaxPool2d(3, stride, 1),
    "avg_pool_3x3": lambda C, stride: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "skip_connect": lambda C, stride: Same() if stride == 1 else Halve(C, C),
    "sep_conv_3x3": lambda C, stride: Separable(C, 3, stride),
    "sep_conv_5x5": lambda C, stride: Separable(C, 5, stride),
    "dil_conv_3x3": lambda C, stride: Dilated(C, 3, stride),
    "dil_conv_5x5": lambda C, stride: Dilated(C, 5, stride),
}
