"""The public ops against their specification in plain torch, on every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast import kernels
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels.ops import (
    NormState,
    dil_conv,
    sep_conv,
    separable_reference,
    weighted_sum,
    weighted_sum_reference,
)
from pdarts_fast.operations import DilConv, SepConv

pytestmark = pytest.mark.usefixtures("one_thread")

# Single precision against float64: sums of some hundred products of unit size, normalised twice.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def off(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value, or to 1 where that is smaller."""
    assert got.shape == want.shape
    scale = want.double().abs().max().clamp_min(1.0)
    return ((got.double() - want.double()).abs().max() / scale).item()


def noise(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


# -- weighted_sum ------------------------------------------------------------------------------


def layouts(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels-last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "gaps":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.contiguous()


@DTYPES
@pytest.mark.parametrize(
    ("shape", "count", "layout"),
    [
        ((2, 16, 4, 4), 3, "contiguous"),
        ((2, 16, 4, 4), 8, "channels-last"),
        ((3, 5, 3, 7), 2, "contiguous"),
        ((1, 1, 1, 1), 1, "contiguous"),
        ((2, 7, 5, 3), 3, "gaps"),
        ((2, 3, 4, 6), 4, "mixed"),
    ],
    ids=["even", "channels-last", "odd", "one", "gaps", "mixed-layouts"],
)
def test_weighted_sum_and_gradients(
    primitives: str, dtype: torch.dtype, shape: Any, count: int, layout: str
) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(count)]
    weights = torch.randn(count, dtype=torch.float64).requires_grad_()
    want = weighted_sum_reference(exact, weights)
    (want * noise(want.shape)).sum().backward()

    kinds = ["contiguous", "channels-last"] if layout == "mixed" else [layout]
    leaves = [
        layouts(x.detach().to(dtype), kinds[i % len(kinds)]).requires_grad_()
        for i, x in enumerate(exact)
    ]
    found = weights.detach().to(dtype).requires_grad_()
    got = weighted_sum(leaves, found, backend=primitives)
    (got * noise(got.shape).to(dtype)).sum().backward()
    assert got.dtype == dtype
    assert off(got, want) <= TOLERANCE[dtype]
    assert off(found.grad, weights.grad) <= TOLERANCE[dtype]
    for leaf, x in zip(leaves, exact, strict=True):
        assert off(leaf.grad, x.grad) <= TOLERANCE[dtype]


def test_weighted_sum_keeps_a_dense_layout(primitives: str) -> None:
    x = torch.randn(2, 16, 4, 4)
    weights = torch.ones(1)
    assert weighted_sum([x], weights, backend=primitives).is_contiguous()
    last = layouts(x, "channels-last")
    out = weighted_sum([last], weights, backend=primitives)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, x)


def test_weighted_sum_in_bfloat16_rounds_once(primitives: str) -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(2, 16, 4, 4).bfloat16() for _ in range(8)]
    weights = torch.rand(8)
    got = weighted_sum(outputs, weights, backend=primitives)
    want = weighted_sum_reference([x.double() for x in outputs], weights.double())
    assert got.dtype == torch.bfloat16
    # Half a unit in the last of 8 bits, and float32 sums.
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-5).all()


def test_weighted_sum_gives_only_the_gradients_that_are_wanted(primitives: str) -> None:
    outputs = [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3, requires_grad=True)]
    weights = torch.rand(2)
    weighted_sum(outputs, weights, backend=primitives).sum().backward()
    assert outputs[0].grad is None
    torch.testing.assert_close(outputs[1].grad, weights[1].expand(1, 2, 3, 3))


@pytest.mark.parametrize(
    ("outputs", "weights", "message"),
    [
        ([], torch.ones(0), "at least one candidate"),
        ([torch.ones(2, 3)], torch.ones(1), r"outputs\[0\]: wanted images"),
        ([torch.ones(1, 1, 2, 2).half()], torch.ones(1), "got float16"),
        ([torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3)], torch.ones(2), r"outputs\[1\]: wanted"),
        ([torch.ones(1, 1, 2, 2)], torch.ones(2), "weights: wanted 1 floating"),
        ([torch.ones(1, 1, 2, 2)], torch.ones(1, dtype=torch.int64), "weights: wanted 1 floating"),
    ],
    ids=["none", "no-image", "half", "shapes-differ", "too-many-weights", "whole-weights"],
)
def test_weighted_sum_refuses(outputs: Any, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(outputs, weights)


# -- sep_conv and dil_conv ---------------------------------------------------------------------

BLOCKS = pytest.mark.parametrize(
    ("kind", "channels", "kernel", "stride", "dilation", "size", "affine", "training"),
    [
        ("sep", 5, 3, 1, 1, (6, 6), True, True),
        ("sep", 16, 5, 2, 1, (7, 9), True, True),
        ("sep", 36, 3, 2, 1, (8, 8), False, True),
        ("sep", 3, 5, 1, 1, (5, 4), True, False),
        ("dil", 8, 3, 1, 2, (6, 5), True, True),
        ("dil", 7, 5, 2, 2, (9, 6), False, True),
        ("dil", 1, 3, 2, 1, (5, 5), True, True),
        ("dil", 20, 5, 1, 2, (6, 6), False, False),
    ],
    ids=lambda value: str(value).lower().replace(", ", "x").strip("()"),
)


def make_module(
    kind: str, channels: int, kernel: int, stride: int, dilation: int, affine: bool
) -> nn.Module:
    """A float64 stock module whose statistics, scales and shifts are not those of a fresh one."""
    torch.manual_seed(0)
    padding = dilation * (kernel - 1) // 2
    if kind == "sep":
        module: nn.Module = SepConv(channels, channels, kernel, stride, padding, affine)
    else:
        module = DilConv(channels, channels, kernel, stride, padding, dilation, affine)
    for norm in norms_of(module):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if affine:
            nn.init.uniform_(norm.weight, -1.0, 1.5)
            nn.init.normal_(norm.bias)
    return module.double()


def norms_of(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def weights_of(module: nn.Module) -> list[Tensor]:
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]


Forward = Callable[[nn.Module, Tensor], Tensor]


def everything(module: nn.Module, x: Tensor, dtype: torch.dtype, run: Forward) -> dict[str, Tensor]:
    """Output, gradients and buffers after one pass, by name."""
    module = copy.deepcopy(module).to(dtype)
    leaf = x.to(dtype).clone(memory_format=torch.preserve_format).requires_grad_()
    out = run(module, leaf)
    (out * noise(out.shape).to(out.dtype)).sum().backward()
    found = {"out": out, "x": leaf.grad, **dict(module.named_buffers())}
    return found | {f"grad {name}": p.grad for name, p in module.named_parameters()}


def by_op(stride: int, dilation: int, training: bool, backend: str) -> Forward:
    """A stock module run by the public op."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        weights, norms = weights_of(module), norms_of(module)
        if len(norms) == 2:
            return sep_conv(x, weights, norms, stride=stride, training=training, backend=backend)
        return dil_conv(
            x,
            weights,
            norms[0],
            stride=stride,
            dilation=dilation,
            training=training,
            backend=backend,
        )

    return run


@DTYPES
@BLOCKS
def test_blocks_are_the_stock_modules(
    primitives: str,
    dtype: torch.dtype,
    kind: str,
    channels: int,
    kernel: int,
    stride: int,
    dilation: int,
    size: tuple[int, int],
    affine: bool,
    training: bool,
) -> None:
    module = make_module(kind, channels, kernel, stride, dilation, affine).train(training)
    torch.manual_seed(1)
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    if channels % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    want = everything(module, x, torch.float64, lambda m, x: m(x))
    got = everything(module, x, dtype, by_op(stride, dilation, training, primitives))
    assert got.keys() == want.keys()
    for name, value in want.items():
        # A ReLU at a tie may fall the other way in single precision and change one image.
        if name in ("out", "x") and dtype != torch.float64:
            images = sorted(off(g, w) for g, w in zip(got[name], value, strict=True))
            assert images[-2] <= TOLERANCE[dtype], f"{name}: images off by {images}"
        else:
            assert off(got[name], value) <= TOLERANCE[dtype], f"{name}"


@BLOCKS
def test_the_specification_is_the_stock_modules(
    kind: str,
    channels: int,
    kernel: int,
    stride: int,
    dilation: int,
    size: tuple[int, int],
    affine: bool,
    training: bool,
) -> None:
    module = make_module(kind, channels, kernel, stride, dilation, affine).train(training)
    x = torch.randn(3, channels, *size, dtype=torch.float64)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        states = [NormState.of(norm) for norm in norms_of(module)]
        return separable_reference(
            x, weights_of(module), states, stride=stride, dilation=dilation, training=training
        )

    want = everything(module, x, torch.float64, lambda m, x: m(x))
    got = everything(module, x, torch.float64, run)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_bfloat16_blocks_are_as_close_as_autocast(primitives: str) -> None:
    module = make_module("sep", 16, 3, 1, 1, True)
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64)
    want = everything(module, x, torch.float64, lambda m, x: m(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = everything(module, x, torch.float32, lambda m, x: m(x))
        fused = everything(module, x, torch.float32, by_op(1, 1, True, primitives))
    assert fused["out"].dtype == torch.bfloat16
    for name in ("out", "x", "grad op.1.weight", "grad op.6.weight", "grad op.3.bias"):
        error = (fused[name].double() - want[name]).norm() / want[name].norm()
        allowed = (stock[name].double() - want[name]).norm() / want[name].norm()
        assert error <= 1.5 * allowed, f"{name}: {error:.1e}, autocast {allowed:.1e}"


def arguments(affine: bool, training: bool, backend: str) -> tuple[Any, ...]:
    """Those of the operator behind ``sep_conv``."""
    module = make_module("sep", 3, 3, 2, 1, affine).float()
    norms = norms_of(module)
    return (
        torch.randn(2, 3, 5, 4, requires_grad=True),
        weights_of(module),
        [g for n in norms for g in (n.weight, n.bias) if g is not None],
        [] if training else [b for n in norms for b in (n.running_mean, n.running_var)],
        2,
        1,
        backend,
        training,
    )


@pytest.mark.parametrize(
    ("affine", "training"),
    [(True, True), (False, True), (True, False)],
    ids=["affine", "plain", "evaluation"],
)
def test_opcheck_separable(primitives: str, affine: bool, training: bool) -> None:
    # No AOT dispatch test: it compares all outputs of two runs, and statistics are not written
    # in evaluation.
    torch.library.opcheck(
        torch.ops.pdarts_fast.separable.default,
        arguments(affine, training, primitives),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_weighted_sum(primitives: str) -> None:
    outputs = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)]
    weights = torch.rand(3, requires_grad=True)
    torch.library.opcheck(
        torch.ops.pdarts_fast.weighted_sum.default, (outputs, weights, primitives)
    )


def test_opcheck_running_statistics() -> None:
    running = [torch.zeros(3), torch.ones(3)]
    stats = torch.rand(1, 2, 4, dtype=torch.float64)
    args = (running, [torch.tensor(0)], stats, 10)
    torch.library.opcheck(torch.ops.pdarts_fast.separable_update.default, args)


def test_compile_sees_one_operator(primitives: str) -> None:
    module = make_module("dil", 4, 3, 1, 2, True).float()
    x = torch.randn(2, 4, 5, 5)
    run = by_op(1, 2, True, primitives)
    twin = copy.deepcopy(module)
    compiled = torch.compile(lambda x: run(twin, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(module, x))
    torch.testing.assert_close(dict(twin.named_buffers()), dict(module.named_buffers()))


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    module = make_module("dil", 3, 3, 1, 2, True).float()
    out = by_op(1, 2, True, "reference")(module, x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def state(channels: int, affine: bool = False) -> NormState:
    gains = (torch.ones(channels), torch.zeros(channels)) if affine else ()
    return NormState(torch.zeros(channels), torch.ones(channels), None, *gains)


def block(channels: int = 4, kernel: int = 3) -> list[Tensor]:
    return [torch.ones(channels, 1, kernel, kernel), torch.ones(channels, channels, 1, 1)]


@pytest.mark.parametrize(
    ("weights", "norms", "settings", "message"),
    [
        (block(), [state(4)], {}, "wanted 4 weights and 2 norms, got 2 and 1"),
        (block(4, 7) * 2, [state(4)] * 2, {}, "wanted a kernel of 3 or 5.*got kernel 7"),
        (block() * 2, [state(4)] * 2, {"stride": 3}, "stride 3"),
        (block(5) * 2, [state(4)] * 2, {}, r"weights\[0\]: wanted \(4, 1, 3, 3\)"),
        (block() * 2, [state(4), state(4, True)], {}, "weight and bias of every norm"),
        (block() * 2, [state(4), state(3)], {}, r"norms\[1\]: wanted 4 channels"),
    ],
    ids=["counts", "kernel", "stride", "shape", "half-affine", "norm-size"],
)
def test_sep_conv_refuses(
    weights: Sequence[Tensor], norms: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sep_conv(torch.ones(2, 4, 5, 5), weights, norms, **settings)


def test_more_is_refused() -> None:
    x = torch.ones(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than one value a channel"):
        dil_conv(x, block(), state(4))
    with pytest.raises(ValueError, match="dil_conv: wanted 2 weights, got 1"):
        dil_conv(x, block()[:1], state(4))
    with pytest.raises(ValueError, match=r"wanted momentum 0\.1"):
        dil_conv(x, block(), nn.BatchNorm2d(4, momentum=0.3))
    with pytest.raises(UsageError, match="--backend nonesuch"):
        dil_conv(x, block(), state(4), training=False, backend="nonesuch")


def test_the_package_offers_them() -> None:
    assert kernels.sep_conv is sep_conv
    assert kernels.weighted_sum is weighted_sum
    with pytest.raises(AttributeError, match="no attribute 'conv'"):
        _ = kernels.conv
