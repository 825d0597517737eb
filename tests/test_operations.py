"""The primitives: output sizes, what each one computes where the contract says something."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.operations import OPS, DilConv, FactorizedReduce, Identity, SepConv


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (5, 6), (2, 3)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("stride", [1, 2], ids=lambda stride: f"stride{stride}")
@pytest.mark.parametrize("name", OPS)
def test_every_primitive_gives_the_same_size(name: str, stride: int, size: tuple[int, int]) -> None:
    op = OPS[name](6, stride, True).double()
    want = (3, 6, -(-size[0] // stride), -(-size[1] // stride))
    assert op(image(3, 6, *size)).shape == want


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("name", OPS)
def test_batch_norm_is_affine_on_demand_and_no_convolution_has_a_bias(
    name: str, affine: bool
) -> None:
    op = OPS[name](4, 2, affine)
    norms = [module for module in op.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.affine == affine and norm.track_running_stats for norm in norms)
    assert all((norm.momentum, norm.eps) == (0.1, 1e-5) for norm in norms)
    convolutions = [module for module in op.modules() if isinstance(module, nn.Conv2d)]
    assert all(convolution.bias is None for convolution in convolutions)


def test_every_stride_2_primitive_but_pools_and_none_ends_in_batch_norm() -> None:
    for name, build in OPS.items():
        y = build(4, 2, False).double()(image(3, 4, 8, 8))
        if name == "none":
            assert not y.any()
        elif "pool" not in name:
            torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(4).double())
            variance = y.var(dim=(0, 2, 3), unbiased=False)
            torch.testing.assert_close(variance, torch.ones(4).double(), rtol=1e-2, atol=0)


def test_skip_is_the_identity_at_stride_1_and_a_factorized_reduce_at_stride_2() -> None:
    x = image(2, 4, 8, 8)
    assert isinstance(OPS["skip_connect"](4, 1, False), Identity)
    assert OPS["skip_connect"](4, 1, False)(x) is x
    assert isinstance(OPS["skip_connect"](4, 2, False), FactorizedReduce)


def test_average_pool_counts_no_padding() -> None:
    ones = torch.ones(1, 1, 5, 5)
    for stride in (1, 2):
        assert torch.all(OPS["avg_pool_3x3"](1, stride, False)(ones) == 1)


@pytest.mark.parametrize(
    ("name", "kernel", "dilation", "padding"),
    [
        ("sep_conv_3x3", 3, 1, 1),
        ("sep_conv_5x5", 5, 1, 2),
        ("sep_conv_7x7", 7, 1, 3),
        ("dil_conv_3x3", 3, 2, 2),
        ("dil_conv_5x5", 5, 2, 4),
    ],
    ids=lambda value: str(value),
)
def test_separable_convolutions_layer_by_layer(
    name: str, kernel: int, dilation: int, padding: int
) -> None:
    torch.manual_seed(0)
    op = OPS[name](3, 2, False).double()
    assert isinstance(op, SepConv if name.startswith("sep") else DilConv)
    y = x = image(2, 3, 9, 8)
    for index, stride in ((0, 2), (4, 1)):
        if index >= len(op.op):
            break
        depthwise = op.get_parameter(f"op.{index + 1}.weight")
        pointwise = op.get_parameter(f"op.{index + 2}.weight")
        assert depthwise.shape == (3, 1, kernel, kernel)
        y = F.conv2d(y.relu(), depthwise, None, stride, padding, dilation, groups=3)
        y = F.batch_norm(F.conv2d(y, pointwise), None, None, training=True)
    torch.testing.assert_close(op(x), y)


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 5), (1, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("channels", [2, 5], ids=lambda channels: f"C={channels}")
def test_factorized_reduce_sees_even_and_odd_pixels(channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    op = FactorizedReduce(3, channels, affine=False).double()
    x = image(4, 3, *size)
    padded = F.pad(x.relu(), (0, 2, 0, 2))
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    even = padded[:, :, 0::2, 0::2][:, :, :rows, :columns]
    odd = padded[:, :, 1::2, 1::2][:, :, :rows, :columns]
    halves = [F.conv2d(even, op.conv_1.weight), F.conv2d(odd, op.conv_2.weight)]
    want = F.batch_norm(torch.cat(halves, dim=1), None, None, training=True)
    torch.testing.assert_close(op(x), want)


def test_factorized_reduce_refuses_one_channel() -> None:
    with pytest.raises(ValueError, match="C_out >= 2, got 1"):
        FactorizedReduce(3, 1)


def test_no_primitive_changes_its_input() -> None:
    x = image(2, 4, 6, 6)
    before = x.clone()
    for build in OPS.values():
        for stride in (1, 2):
            build(4, stride, True).double()(x)
    assert torch.equal(x, before)
