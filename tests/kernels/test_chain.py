"""All cells of a supernet in one call against cells called one by one: equal bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pdarts_fast import supernet
from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels import chain
from pdarts_fast.kernels.cpu import chain as cpu_chain
from pdarts_fast.kernels.cpu import memory
from pdarts_fast.supernet import Cell, Network

pytestmark = pytest.mark.usefixtures("compiled")

CHANNELS, CLASSES = 16, 10


def network(layers: int = 8, live: int = 4, p: float = 0.3, **kwargs: Any) -> Network:
    """A supernet on backend ``cpu`` with ``live`` random operations an edge."""
    torch.manual_seed(0)
    np.random.seed(0)
    tables = np.zeros((2, 14, 8), dtype=bool)
    for row in tables.reshape(-1, 8):
        row[np.random.choice(8, live, replace=False)] = True
    settings = {"switches_normal": tables[0], "switches_reduce": tables[1], "p": p, **kwargs}
    channels = settings.pop("channels", CHANNELS)
    loss = nn.CrossEntropyLoss()
    return Network(channels, CLASSES, layers, loss, backend="cpu", **settings)


def batch(images: int = 4, height: int = 12, width: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, height, width, generator=generator), torch.arange(
        images
    ) % CLASSES


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every forward pass whether all cells ran in one call."""
    found: list[bool] = []

    def run(*args: Any) -> Tensor | None:
        out = chain_run(*args)
        found.append(out is not None)
        return out

    chain_run = chain.run
    monkeypatch.setattr(chain, "run", run)
    return found


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes cells run one by one from then on."""
    return lambda: monkeypatch.setattr(chain, "run", lambda *_: None)


def step(net: Network, images: Tensor, labels: Tensor, *, amp: bool = False) -> dict[str, Tensor]:
    """Loss, every gradient and every buffer after two passes."""
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = net._loss(images, labels)
        loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad for name, p in net.named_parameters() if p.grad is not None},
        **dict(net.named_buffers()),
    }


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name, value in want.items() if not torch.equal(got[name], value)] == []


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("live", [8, 3], ids=lambda live: f"{live}-ops")
@pytest.mark.parametrize("layers", [3, 5, 8], ids=lambda layers: f"{layers}-cells")
def test_is_the_cells_bit_for_bit(
    layers: int, live: int, amp: bool, ways: list[bool], one_by_one: Callable[[], None]
) -> None:
    got = step(network(layers, live), *batch(), amp=amp)
    assert ways == [True, True]
    one_by_one()
    assert_equal(got, step(network(layers, live), *batch(), amp=amp))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 9), (2, 1, 11)], ids=["one", "odd", "row"])
def test_any_size(
    shape: tuple[int, int, int], amp: bool, ways: list[bool], one_by_one: Callable[[], None]
) -> None:
    got = step(network(), *batch(*shape), amp=amp)
    assert ways == [True, True]
    one_by_one()
    assert_equal(got, step(network(), *batch(*shape), amp=amp))


@pytest.mark.parametrize("p", [0.1, 0.4, 0.999])
def test_any_dropout_rate(p: float, ways: list[bool], one_by_one: Callable[[], None]) -> None:
    got = step(network(3, p=p), *batch())
    assert ways == [True, True]
    one_by_one()
    assert_equal(got, step(network(3, p=p), *batch()))


def test_is_the_same_at_any_number_of_threads(ways: list[bool]) -> None:
    found = []
    before = torch.get_num_threads()
    try:
        # More threads than a machine has cores wait for one another asleep.
        for threads in (1, 2, 3, 32):
            torch.set_num_threads(threads)
            values = step(network(), *batch(8, 16, 16))
            # What torch computes itself, the classifier, may depend on threads.
            found.append({k: v for k, v in values.items() if k.startswith(("cells", "alphas"))})
    finally:
        torch.set_num_threads(before)
    assert ways == [True] * 8
    for other in found[1:]:
        assert_equal(other, found[0])


def freeze_weights(net: Network) -> None:
    for parameter in net.weight_parameters():
        parameter.requires_grad_(False)


def freeze_alphas(net: Network) -> None:
    for parameter in net.arch_parameters():
        parameter.requires_grad_(False)


def freeze_some(net: Network) -> None:
    for parameter in list(net.cells[1].parameters())[::2]:
        parameter.requires_grad_(False)
    net.alphas_reduce.requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_weights, freeze_alphas, freeze_some])
def test_gives_the_gradients_that_are_asked_for(
    freeze: Callable[[Network], None], ways: list[bool], one_by_one: Callable[[], None]
) -> None:
    nets = [network() for _ in range(2)]
    for net in nets:
        freeze(net)
    got = step(nets[0], *batch())
    assert ways == [True, True]
    one_by_one()
    assert_equal(got, step(nets[1], *batch()))


class Subclass(Cell):
    """Does the same by another class."""


def hook(net: Network) -> None:
    net.cells[2].register_forward_hook(lambda module, args, out: 2 * out)


def replace_forward(net: Network) -> None:
    cell: Any = net.cells[2]
    before = cell.forward
    cell.forward = lambda *args: 2 * before(*args)


def subclass(net: Network) -> None:
    net.cells[2].__class__ = Subclass


def evaluate_one(net: Network) -> None:
    net.cells[2].eval()


@pytest.mark.parametrize("change", [hook, replace_forward, subclass, evaluate_one, nn.Module.eval])
def test_cells_that_are_more_than_a_chain_are_called(
    change: Callable[[Network], Any], ways: list[bool]
) -> None:
    """What the change does shows: equal to the published graph with the same change."""
    net = network(p=0.0)
    reference = network(p=0.0)
    reference.load_state_dict(net.state_dict())
    reference._requested_backend = "reference"
    step(net, *batch())
    step(reference, *batch())
    assert ways == [True, True, False, False]
    for one in (net, reference):
        change(one)
    with torch.no_grad():
        got, want = net(batch()[0]), reference(batch()[0])
    assert ways[4:] == [False, False]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"channels": 10}, {"multiplier": 3}], ids=["padded", "three-nodes"]
)
def test_other_networks_run_cell_by_cell(settings: dict[str, Any], ways: list[bool]) -> None:
    step(network(**settings), *batch())
    assert ways == [False, False]


def test_float64_and_primitives_run_cell_by_cell(ways: list[bool]) -> None:
    images, labels = batch()
    with fused.primitive_by_primitive("cpu"):
        step(network(), images, labels)
    step(network().double(), images.double(), labels)
    assert ways == [False] * 4


def test_follows_what_becomes_of_the_modules(
    ways: list[bool], one_by_one: Callable[[], None]
) -> None:
    """A copy, an exchanged cell, an exchanged parameter and buffer are those that are read."""
    nets = []
    for _ in range(2):
        first = network(p=0.0)
        step(first, *batch())
        net = copy.deepcopy(first)
        step(net, *batch())
        step(first, *batch())
        net.cells[2] = copy.deepcopy(net.cells[2])
        convolution: Any = net.cells[1].preprocess0.op[1]
        convolution.weight = nn.Parameter(convolution.weight.detach() * 2)
        norm: Any = net.cells[1].preprocess0.op[2]
        norm.running_mean = norm.running_mean + 1
        step(net, *batch())
        nets.append(net)
        if len(nets) == 1:
            assert all(ways)
            one_by_one()
    assert_equal(*(step(net, *batch()) for net in nets))


def test_a_cell_with_a_dropout_of_its_own_keeps_it(ways: list[bool]) -> None:
    net = network(layers=5)
    step(net, *batch())
    net.cells[2] = copy.deepcopy(net.cells[2])
    step(net, *batch())
    assert ways == [True, True, False, False]


def test_a_graph_can_be_gone_through_twice() -> None:
    net = network()
    loss = net._loss(*batch())
    weights = net.weight_parameters()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, weights)))


def test_what_is_kept_can_be_moved(ways: list[bool]) -> None:
    """Arrays that saved-tensor hooks bring back lie elsewhere."""
    want = step(network(), *batch())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        got = step(network(), *batch())
    assert all(ways)
    assert_equal(got, want)


def test_a_weight_changed_before_backward_is_noticed() -> None:
    net = network()
    loss = net._loss(*batch())
    with torch.no_grad():
        net.cells[1].preprocess0.op[1].weight.add_(1)  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    net = network()
    loss = net._loss(*batch())
    grads = torch.autograd.grad(loss, net.arch_parameters(), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; build the network with backend"):
        grads[0].sum().backward()


def test_the_supernet_uses_it(ways: list[bool]) -> None:
    assert supernet.chain is chain
    network()(batch()[0])
    assert ways == [True]


def test_every_gradient_is_written() -> None:
    net, (x, y) = network(channels=32, live=8), batch()
    twin = copy.deepcopy(net)
    net._loss(x, y).backward()
    want = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    poisoned = [block for blocks in memory.pool._blocks.values() for _, block in blocks]
    for block in poisoned:
        block.view(np.float32).fill(np.nan)
    twin._loss(x, y).backward()
    got = [p.grad for p in twin.parameters() if p.grad is not None]
    assert len(poisoned) > 0
    assert sum(g.nbytes for g in want) > memory._SMALLEST
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))


def test_small_objects_move_when_a_search_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(cpu_chain, "_SETTLED", 3)
    monkeypatch.setattr(cpu_chain, "collapse_small_pages", lambda: moved.append(1))
    net, (x, y) = network(layers=3), batch(images=3, height=8, width=8)
    counts = []
    for _ in range(5):
        net._loss(x, y).backward()
        counts.append(len(moved))
    assert counts == [0, 0, 1, 1, 1]
