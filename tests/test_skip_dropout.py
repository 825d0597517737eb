"""Skip dropout: its rate, its masks, and how one state is shared by a whole network."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.kernels import philox
from pdarts_fast.skip_dropout import DropoutControl, SkipDropout
from pdarts_fast.supernet import Cell, MixedOp, Network

pytestmark = pytest.mark.usefixtures("one_thread")

SKIP_AND_POOL = [[name in ("max_pool_3x3", "skip_connect") for name in PRIMITIVES]] * 14


def skip_network(p: float, **arguments: Any) -> Network:
    torch.manual_seed(11)
    return Network(
        2,
        3,
        3,
        F.cross_entropy,
        switches_normal=SKIP_AND_POOL,
        switches_reduce=SKIP_AND_POOL,
        p=p,
        backend="reference",
        **arguments,
    )


def skip_dropouts(network: Network) -> list[SkipDropout]:
    return [module for module in network.modules() if isinstance(module, SkipDropout)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7], ids=lambda p: f"p={p}")
def test_drops_a_share_p_and_scales_the_rest(p: float) -> None:
    dropout = SkipDropout(DropoutControl(p, seed=5), stream=3)
    y = dropout(torch.ones(8, 16, 32, 32))
    kept = y != 0
    count = y.numel()
    deviation = (count * p * (1 - p)) ** 0.5
    assert abs((~kept).sum().item() - count * p) < 5 * deviation
    rate = torch.tensor(p)
    assert torch.all(y[kept] == 1 / (1 - rate))


def test_the_gradient_takes_the_same_mask() -> None:
    dropout = SkipDropout(DropoutControl(0.4, seed=5), stream=3)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_evaluation_and_rate_zero_change_nothing() -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    dropout = SkipDropout(DropoutControl(0.4, seed=5), stream=3)
    assert torch.equal(dropout.eval()(x), x)
    dropout.control.set_rate(0.0)
    assert torch.equal(dropout.train()(x), x)


def test_same_step_repeats_and_another_step_seed_or_stream_does_not() -> None:
    x = torch.ones(2, 4, 8, 8)
    control = DropoutControl(0.5, seed=5)
    first = SkipDropout(control, stream=3)(x)
    assert torch.equal(SkipDropout(control, stream=3)(x), first)
    assert not torch.equal(SkipDropout(control, stream=4)(x), first)
    assert not torch.equal(SkipDropout(DropoutControl(0.5, seed=6), stream=3)(x), first)
    control.advance()
    assert not torch.equal(SkipDropout(control, stream=3)(x), first)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1], ids=lambda seed: f"seed={seed}")
def test_any_64_bit_seed_is_taken(seed: int) -> None:
    control = DropoutControl(0.5, seed)
    assert control.state[0].item() % 2**64 == seed % 2**64


def test_every_stride_1_identity_has_its_own_stream_and_no_other_op_has_one() -> None:
    network = skip_network(p=0.3)
    cells = [cast(Cell, cell) for cell in network.cells]
    want = {
        cell.index * 64 + edge
        for cell in cells
        for edge, (_, _, stride) in enumerate(cell.edges)
        if stride == 1
    }
    streams = [dropout.stream for dropout in skip_dropouts(network)]
    assert len(streams) == len(set(streams))
    assert set(streams) == want
    assert skip_dropouts(skip_network(p=0.0)) == []


def test_no_dropout_shows_in_the_state_dict() -> None:
    assert skip_network(p=0.3).state_dict().keys() == skip_network(p=0.0).state_dict().keys()


def test_training_forwards_advance_the_step_and_evaluation_does_not() -> None:
    network = skip_network(p=0.3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x)
    network(x)
    assert network.dropout_state.tolist()[1] == 2
    network.eval()(x)
    assert network.dropout_state.tolist()[1] == 2
    without = skip_network(p=0.0)
    without(x)
    assert without.dropout_state.tolist()[1] == 0


def test_restoring_the_state_repeats_a_forward() -> None:
    network = skip_network(p=0.3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    saved = network.dropout_state.clone()
    first, second = network(x), network(x)
    network.dropout_state.copy_(saved)
    assert torch.equal(network(x), first)
    assert not torch.equal(second, first)


def test_the_seed_of_the_masks_follows_torch_manual_seed() -> None:
    assert skip_network(p=0.3).dropout_state.tolist() == [11, 0]


def test_update_p_reaches_every_dropout_in_place() -> None:
    network = skip_network(p=0.3)
    tensors = {id(dropout.control.p) for dropout in skip_dropouts(network)}
    network.p = 0.6
    assert network.skip_dropout.p.item() == pytest.approx(0.3)
    network.update_p()
    assert network.skip_dropout.p.item() == pytest.approx(0.6)
    assert {id(dropout.control.p) for dropout in skip_dropouts(network)} == tensors
    assert len(tensors) == 1


def test_update_p_to_zero_switches_dropout_off() -> None:
    network, without = skip_network(p=0.3), skip_network(p=0.0)
    without.load_state_dict(network.state_dict())
    network.p = 0.0
    network.update_p()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x), without(x))


@pytest.mark.parametrize(
    ("built_with", "p", "message"),
    [(0.3, 1.0, "0 <= p < 1, got 1.0"), (0.0, 0.2, "built with p=0 and has no skip dropout")],
    ids=["out_of_range", "built_without"],
)
def test_update_p_refuses_what_it_cannot_do(built_with: float, p: float, message: str) -> None:
    network = skip_network(p=built_with)
    network.p = p
    with pytest.raises(ValueError, match=message):
        network.update_p()


def test_a_deep_copy_shares_with_itself_and_not_with_the_original() -> None:
    network = skip_network(p=0.3)
    twin = copy.deepcopy(network)
    twin.p = 0.6
    twin.update_p()
    assert {dropout.control.p.item() for dropout in skip_dropouts(twin)} == {
        twin.skip_dropout.p.item()
    }
    assert twin.skip_dropout.p.item() == pytest.approx(0.6)
    assert network.skip_dropout.p.item() == pytest.approx(0.3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    twin(x)
    assert network.dropout_state.tolist()[1] == 0
    assert twin.dropout_state.tolist()[1] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_converting_the_network_keeps_rate_state_and_masks(dtype: torch.dtype) -> None:
    network = skip_network(p=0.3).to(dtype)
    assert network.skip_dropout.p.dtype == torch.float32
    assert network.skip_dropout.p.item() == pytest.approx(0.3, rel=1e-7)
    assert network.dropout_state.dtype == torch.int64
    assert all(dropout.control is network.skip_dropout for dropout in skip_dropouts(network))
    control = DropoutControl(0.3, seed=5)
    want = SkipDropout(control, stream=3)(torch.ones(2, 4, 8, 8)) != 0
    got = SkipDropout(control, stream=3).to(dtype)(torch.ones(2, 4, 8, 8, dtype=dtype))
    assert got.dtype == dtype
    assert torch.equal(got != 0, want)


def test_moving_the_network_moves_rate_and_state() -> None:
    network = skip_network(p=0.3).to("meta")
    assert network.skip_dropout.p.device.type == "meta"
    assert network.dropout_state.device.type == "meta"
    assert {dropout.control.p.device.type for dropout in skip_dropouts(network)} == {"meta"}


def test_an_edge_drops_its_skip_and_nothing_else() -> None:
    control = DropoutControl(0.5, seed=5)
    edge = MixedOp(4, 1, SKIP_AND_POOL[0], control, stream=9)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    only_skip = edge(x, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(only_skip, SkipDropout(control, stream=9)(x))
    plain = MixedOp(4, 1, SKIP_AND_POOL[0])
    only_pool = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(edge(x, only_pool), plain(x, only_pool))


def test_a_traced_dropout_reads_rate_and_state_at_replay() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    p, state = torch.tensor([0.3]), torch.tensor([5, 1])

    def step(x: torch.Tensor, p: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return philox.dropout(x, p, state, stream=3)

    graph = make_fx(step)(x, p, state)
    assert "_local_scalar_dense" not in graph.code
    other_p, other_state = torch.tensor([0.6]), torch.tensor([7, 2])
    want = step(x, other_p, other_state)
    assert torch.equal(graph(x, other_p, other_state), want)
    assert not torch.equal(want, step(x, p, state))
