"""The compiled stem against its own modules in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.kernels import backends, stem
from pdarts_fast.kernels.cpu.stem import CompiledStem
from pdarts_fast.stem import Stem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]

# As for a cell: a few roundings of long sums; bfloat16 keeps 8 bits.
FLOAT32, BFLOAT16 = 2e-6, 1e-2
SHAPES = {
    "cifar": (4, 3, 32, 32),
    "odd": (3, 3, 17, 13),
    "one-column": (2, 3, 9, 1),
    "one-image": (1, 3, 2, 70),
    "many-images": (37, 3, 4, 4),
}


@pytest.fixture
def convolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of output channels of every convolution that the kernels ran."""
    found: list[int] = []
    own = CompiledStem.convolve

    def counted(self: CompiledStem, image: Tensor, weight: Tensor, y: Tensor, sums: Tensor) -> None:
        found.append(len(weight))
        own(self, image, weight, y, sums)

    monkeypatch.setattr(CompiledStem, "convolve", counted)
    return found


def make(channels: int, training: bool) -> Stem:
    """A stem on the compiled kernels, with statistics, scale and shift that are not 0 and 1."""
    backends.load("cpu").register()
    torch.manual_seed(0)
    module = Stem(channels)
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            assert tensor is not None
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.normal_()
    module.backend = "cpu"
    return module.train(training)


def results(module: nn.Module, x: Tensor, *, amp: bool = False) -> dict[str, Tensor]:
    """Output, all gradients and all buffers of a pass; what the module was before stays."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        out = module(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(direction.to(out.dtype))
    assert x.grad is not None
    found = {"output": out.detach(), "image": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b.detach() for name, b in module.named_buffers()}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference of each by the largest number of it."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = value.double().abs().max().clamp_min(1e-3)
        assert (got[name].double() - value.double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_its_modules(convolved: list[int], shape: tuple[int, ...], training: bool) -> None:
    module, x = make(48, training), torch.randn(shape)
    got = results(module, x)
    assert convolved == [48, 48]
    compare(got, results(copy.deepcopy(module).double(), x.double()), FLOAT32)
    last = x.to(memory_format=torch.channels_last)
    compare(results(module, last), got, 0.0)


def test_amp_is_bfloat16(convolved: list[int]) -> None:
    module, x = make(48, True), torch.randn(SHAPES["cifar"])
    got = results(module, x, amp=True)
    assert convolved == [48, 48]
    assert got["output"].dtype == torch.bfloat16
    compare(got, results(copy.deepcopy(module).double(), x.double()), BFLOAT16)


def test_far_from_zero(convolved: list[int]) -> None:
    """Images with a mean of a hundred deviations, as of raw bytes."""
    module, x = make(16, True), torch.randn(4, 3, 16, 16) + 100
    got, want = results(module, x), results(copy.deepcopy(module).double(), x.double())
    module.backend = backends.REFERENCE
    torchs = results(module, x)
    assert convolved == [16, 16]
    for name in ("output", "0.weight", "1.weight"):
        off = (got[name] - want[name]).abs().max()
        assert off <= 3 * (torchs[name] - want[name]).abs().max(), name


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_at_any_number_of_threads(convolved: list[int], threads: int) -> None:
    module, x = make(32, True), torch.randn(8, 3, 16, 16)
    got = results(module, x)
    torch.set_num_threads(threads)
    compare(results(module, x), got, 0.0)


def test_what_kernels_do_not_take_goes_through_the_modules(convolved: list[int]) -> None:
    x = torch.randn(2, 3, 8, 8)
    make(18, True)(x)
    make(16, True).double()(x.double())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(16, True)(torch.randn(1, 3, 1, 1))
    with pytest.raises(RuntimeError, match="channels"):
        make(16, True)(torch.randn(2, 4, 8, 8))
    assert convolved == []


def test_gradients_that_nobody_asks_for(convolved: list[int]) -> None:
    module, x = make(16, True), torch.randn(2, 3, 8, 8)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    convolved.clear()
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert convolved == [16]


def test_opcheck() -> None:
    module, x = make(16, True), torch.randn(2, 3, 6, 6, requires_grad=True)
    conv, norm = module
    for running in ([], [norm.running_mean, norm.running_var]):
        given = (conv.weight, norm.weight, norm.bias, running, "cpu", torch.float32)
        torch.library.opcheck(torch.ops.pdarts_fast.stem_forward, (x, *given))


def test_second_derivative_is_refused() -> None:
    module, x = make(16, True), torch.randn(2, 3, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


def test_traced_is_bitwise_the_same(convolved: list[int]) -> None:
    module, x = make(16, True), torch.randn(4, 3, 8, 8)
    traced = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    outs = []
    for one in (module, traced):
        out = one(x)
        out.square().sum().backward()
        outs.append(out)
    compare({"output": outs[1]}, {"output": outs[0]}, 0.0)
    for p, q in zip(module.parameters(), traced.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    for b, c in zip(module.buffers(), traced.buffers(), strict=True):
        assert torch.equal(b, c)
    assert convolved == [16] * 4


def test_which_convolutions() -> None:
    usual = {"kernel_size": 3, "padding": 1, "bias": False}
    assert stem.is_known_convolution(nn.Conv2d(3, 16, **usual))
    for other in (
        {"bias": True},
        {"stride": 2},
        {"padding": 0},
        {"kernel_size": 5},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"groups": 3},
    ):
        assert not stem.is_known_convolution(nn.Conv2d(3, 18, **{**usual, **other}))
