"""Derived cells run as one operator against their modules, by every set of primitives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.cells import choice, derived
from pdarts_fast.genotype import NAMED, PDARTS, Genotype
from pdarts_fast.kernels import backends
from pdarts_fast.network import Cell, NetworkCIFAR

pytestmark = pytest.mark.usefixtures("one_thread")

# Every primitive the kernels have, at both strides; not all nodes in the output, in an order of
# its own; a skip and a pool out of a node.
MIXED = Genotype(
    normal=[
        ("sep_conv_5x5", 0),
        ("skip_connect", 1),
        ("max_pool_3x3", 2),
        ("dil_conv_5x5", 0),
        ("none", 1),
        ("avg_pool_3x3", 3),
    ],
    normal_concat=[4, 2],
    reduce=[
        ("skip_connect", 0),
        ("dil_conv_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("sep_conv_3x3", 0),
        ("avg_pool_3x3", 0),
    ],
    reduce_concat=[2, 3, 4],
)
GENOTYPES = {"PDARTS": PDARTS, "DARTS_V2": NAMED["DARTS_V2"], "mixed": MIXED}
CELLS = pytest.mark.parametrize(
    ("genotype", "reduction", "reduction_prev", "channels", "side", "training", "drop_path"),
    [
        ("PDARTS", False, False, 5, 6, True, 0.0),
        ("PDARTS", True, False, 4, 7, True, 0.0),
        ("PDARTS", False, True, 36, 8, True, 0.3),
        ("DARTS_V2", False, False, 16, 5, True, 0.0),
        ("DARTS_V2", True, True, 3, 6, False, 0.3),
        ("mixed", False, False, 7, 6, True, 0.4),
        ("mixed", True, False, 2, 9, True, 0.4),
        ("mixed", False, True, 8, 4, False, 0.0),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).lower(),
)


@pytest.fixture(params=["reference", "cpu"])
def primitives(request: Any) -> str:
    """Name of a set of primitives; skips those that are not built."""
    found = backends.available()[request.param]
    if not found.usable:
        pytest.skip(found.reason)
    if request.param != backends.REFERENCE:
        backends.load(request.param).register()
    return request.param


def make_cell(
    name: str, channels: int, reduction: bool, reduction_prev: bool, seed: int = 0
) -> Cell:
    """A float64 cell whose statistics, scales and shifts are not those of a fresh one."""
    torch.manual_seed(seed)
    cell = Cell(GENOTYPES[name], 3 * channels, 2 * channels, channels, reduction, reduction_prev)
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return cell.double()


def images(channels: int, side: int, larger: bool) -> tuple[Tensor, Tensor]:
    """float64 s0 and s1 of 3 images."""
    torch.manual_seed(1)
    wide = 2 * side if larger else side
    s0 = torch.randn(3, 3 * channels, wide, wide, dtype=torch.float64)
    return s0, torch.randn(3, 2 * channels, side, side, dtype=torch.float64)


Runner = Callable[[Cell, Tensor, Tensor], Tensor]


def everything(cell: Cell, inputs: tuple[Tensor, Tensor], dtype: torch.dtype, run: Runner) -> Any:
    """Output, gradients and buffers after one pass, as float64 by name."""
    cell = copy.deepcopy(cell).to(dtype)
    s0, s1 = (x.to(dtype).clone().requires_grad_() for x in inputs)
    torch.manual_seed(7)
    out = run(cell, s0, s1)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * noise.to(out.dtype)).sum().backward()
    found = {"out": out, "s0": s0.grad, "s1": s1.grad, **dict(cell.named_buffers())}
    found |= {f"grad {name}": p.grad for name, p in cell.named_parameters()}
    return {name: value.detach().double() for name, value in found.items()}


def off(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value, or to 1 where that is smaller."""
    return ((got - want).abs().max() / want.abs().max().clamp_min(1.0)).item()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """All values by name; in single precision one image in three may have a flipped ReLU."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        if name in ("out", "s0", "s1") and tolerance > 1e-9:
            by_image = sorted(off(g, w) for g, w in zip(got[name], value, strict=True))
            assert by_image[-2] <= tolerance, f"{name}: images off by {by_image}"
        else:
            assert off(got[name], value) <= tolerance, f"{name}: {off(got[name], value):.1e}"


@CELLS
def test_everything_is_that_of_the_modules(
    primitives: str,
    genotype: str,
    reduction: bool,
    reduction_prev: bool,
    channels: int,
    side: int,
    training: bool,
    drop_path: float,
) -> None:
    cell = make_cell(genotype, channels, reduction, reduction_prev).train(training)
    inputs = images(channels, side, reduction_prev)
    dtype = torch.float64 if primitives == "reference" else torch.float32
    # float64 against float64 with the same masks: those of a dtype are those of another.
    want = everything(
        cell, inputs, torch.float64, lambda c, a, b: c.forward_op_by_op(a, b, drop_path)
    )
    got = everything(
        cell, inputs, dtype, lambda c, a, b: derived.run(c, primitives, a, b, drop_path)
    )
    # Where the reference runs in float64 it differs by rounding; float32 sums of some hundred
    # pixels of unit size lose four digits behind up to four BatchNorms.
    assert_same(got, want, 1e-10 if dtype == torch.float64 else 2e-4)


def test_bfloat16_is_as_close_as_autocast_is(primitives: str) -> None:
    names = ("out", "grad _ops.3.op.1.weight", "grad _ops.4.op.7.bias")
    errors = dict.fromkeys(names, 0.0)
    allowed = dict.fromkeys(names, 0.0)
    inputs = images(16, 8, False)

    def stock_run(c: Cell, a: Tensor, b: Tensor) -> Tensor:
        return c.forward_op_by_op(a, b, 0.0)

    # Where a rounding falls decides more of one cell's error than how it was computed.
    for seed in range(12):
        cell = make_cell("PDARTS", 16, False, False, seed)
        want = everything(cell, inputs, torch.float64, stock_run)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock = everything(cell, inputs, torch.float32, stock_run)
            fused = everything(
                cell, inputs, torch.float32, lambda c, a, b: derived.run(c, primitives, a, b, 0.0)
            )
        assert fused["out"].dtype == torch.float64
        for name in names:
            errors[name] += ((fused[name] - want[name]).norm() / want[name].norm()).item() / 12
            allowed[name] += ((stock[name] - want[name]).norm() / want[name].norm()).item() / 12
    for name in names:
        assert errors[name] <= 1.25 * allowed[name], (
            f"{name}: {errors[name]:.1e}, {allowed[name]:.1e}"
        )


def test_only_what_is_wanted_gets_a_gradient(primitives: str) -> None:
    cell = make_cell("PDARTS", 4, False, False).float()
    s0, s1 = (x.float() for x in images(4, 6, False))
    for parameter in cell.parameters():
        parameter.requires_grad_(False)
    cell._ops[1].op[3].bias.requires_grad_()
    s1.requires_grad_()
    derived.run(cell, primitives, s0, s1, 0.0).square().sum().backward()
    want = copy.deepcopy(cell)
    twin = s1.detach().clone().requires_grad_()
    for parameter in want.parameters():
        parameter.grad = None
    want.forward_op_by_op(s0, twin, 0.0).square().sum().backward()
    assert s0.grad is None
    torch.testing.assert_close(s1.grad, twin.grad, rtol=1e-3, atol=1e-3)
    grads = {name for name, p in cell.named_parameters() if p.grad is not None}
    assert grads == {"_ops.1.op.3.bias"}
    torch.testing.assert_close(cell._ops[1].op[3].bias.grad, want._ops[1].op[3].bias.grad)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_opcheck(primitives: str, training: bool) -> None:
    cell = make_cell("PDARTS", 3, False, False).float().train(training)
    names = derived.Names(cell)
    s0, s1 = (x.float().requires_grad_() for x in images(3, 4, False))
    masks = derived.draw_masks(names, s1.detach(), 0.5 if training else 0.0)
    running = [b.clone() for n in names.norms for b in (n.running_mean, n.running_var)]
    args = (
        s0,
        s1,
        [c.weight.detach().clone().requires_grad_() for c in names.convolutions],
        [g.detach().clone().requires_grad_() for n in names.norms for g in (n.weight, n.bias)],
        [] if training else running,
        masks,
        names.key,
        primitives,
        training,
        torch.float32,
    )
    # No AOT dispatch test: it compares all outputs of two runs, and statistics of pools without
    # BatchNorm are left as they are.
    torch.library.opcheck(
        torch.ops.pdarts_fast.derived_forward.default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_second_derivatives_are_refused() -> None:
    cell = make_cell("PDARTS", 3, False, False)
    s0, s1 = (x.requires_grad_() for x in images(3, 4, False))
    out = derived.run(cell, "reference", s0, s1, 0.0)
    (grad,) = torch.autograd.grad(out.square().sum(), s0, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def network(backend: str, genotype: Genotype = PDARTS) -> NetworkCIFAR:
    torch.manual_seed(0)
    made = NetworkCIFAR(4, 10, 3, False, genotype)
    made.use_backend(backend)
    return made


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def fused_cells(made: NetworkCIFAR, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many cells of a network went through the operator."""
    calls: list[str] = []
    real = derived.run

    def spy(cell: nn.Module, backend: str, *args: Any) -> Tensor:
        calls.append(backend)
        return real(cell, backend, *args)

    with monkeypatch.context() as patch:
        patch.setattr(derived, "run", spy)
        made(x)
    return len(calls)


def test_network_trains_alike_on_the_kernels(
    compiled_cpu: str, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    for backend in ("reference", compiled_cpu):
        made = network(backend)
        made.drop_path_prob = 0.2
        wanted = 3 if backend == compiled_cpu else 0
        assert fused_cells(copy.deepcopy(made), batch, monkeypatch) == wanted
        optimizer = torch.optim.SGD(made.parameters(), 0.05, momentum=0.9)
        torch.manual_seed(3)
        found = []
        for step in range(4):
            loss = F.cross_entropy(made(batch)[0], torch.arange(4) + step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        found.append(made.eval()(batch)[0].sum().item())
        losses[backend] = torch.tensor(found)
    assert losses["reference"].std() > 1e-3
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=2e-3, atol=2e-3)


@pytest.fixture
def compiled_cpu() -> str:
    """``cpu``, or a skip where the C++ kernels are not built."""
    found = backends.available()["cpu"]
    if not found.usable:
        pytest.skip(found.reason)
    return "cpu"


def test_what_the_kernels_lack_runs_on_its_modules(
    compiled_cpu: str, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its reductions, two of three cells, have 7×7 convolutions.
    assert fused_cells(network("cpu", NAMED["NASNet"]), batch, monkeypatch) == 1
    frozen = network("cpu")
    assert fused_cells(frozen, batch, monkeypatch) == 3
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert fused_cells(frozen, batch, monkeypatch) == 0
    replaced = network("cpu").eval()
    assert fused_cells(replaced, batch, monkeypatch) == 3
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(replaced)
    assert fused_cells(synced.eval(), batch, monkeypatch) == 0
    assert fused_cells(network("auto").double(), batch.double(), monkeypatch) == 0


@pytest.mark.parametrize(
    ("batch_size", "training", "amp", "fused"),
    [(40, True, False, 3), (40, True, True, 0), (2, True, False, 0), (40, False, False, 1)],
    ids=["training", "bfloat16", "small", "evaluation"],
)
def test_auto_takes_what_was_measured_to_be_faster(
    compiled_cpu: str,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    training: bool,
    amp: bool,
    fused: int,
) -> None:
    torch.manual_seed(0)
    made = NetworkCIFAR(32, 10, 3, False, PDARTS).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp), torch.no_grad():
        # Nodes have 327,680 elements for 40 images, then half and a quarter of that.
        assert fused_cells(made, torch.randn(batch_size, 3, 16, 16), monkeypatch) == fused


def test_a_single_value_a_channel_is_refused_as_torch_does(compiled_cpu: str) -> None:
    made = network("cpu")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(torch.randn(1, 3, 4, 4))


def test_backends_are_checked_and_said_once(
    caplog: pytest.LogCaptureFixture, batch: Tensor
) -> None:
    from pdarts_fast.errors import UsageError

    with pytest.raises(UsageError, match="--backend nonesuch"):
        network("nonesuch")
    assert choice.resolve("auto", "meta", 36) == backends.REFERENCE
    assert network("reference").cells[0].backend == backends.REFERENCE


def test_replicas_use_their_own_parameters(compiled_cpu: str, batch: Tensor) -> None:
    made = network("cpu").eval()
    want = made(batch)[0]
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(made(batch)[0], want)
    assert not torch.equal(twin(batch)[0], want)
