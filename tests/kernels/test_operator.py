"""The cell as an operator of torch: what is computed, traced, refused and given back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.interface import Arrays
from pdarts_fast.kernels.reference import Reference
from pdarts_fast.supernet import Network

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_network(stage: int, backend: str) -> tuple[Network, dict[str, Tensor]]:
    """The float64 network of a golden file in its initial state, and the file's tensors."""
    path = GOLDEN / f"supernet_stage{stage}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    network = Network(
        config["C"],
        config["num_classes"],
        config["layers"],
        F.cross_entropy,
        switches_normal=config["switches_normal"],
        switches_reduce=config["switches_reduce"],
        backend=backend,
    ).double()
    initial = {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")}
    network.load_state_dict(initial)
    return network, tensors


@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda stage: f"stage{stage}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden_networks(kernels: str, stage: int, dtype: torch.dtype) -> None:
    network, want = golden_network(stage, kernels)
    network.to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    x, y = want["x"].to(dtype), want["y"]
    loss = F.cross_entropy(network(x[0]), y[0])
    loss.backward()

    def check(name: str, got: Tensor) -> None:
        wanted = want[name]
        # A parameter in front of a BatchNorm has a gradient of pure rounding: compare with 1.
        scale = max(wanted.abs().max().item(), 1e-2)
        assert (got.double() - wanted).abs().max().item() <= tolerance * scale, name

    check("loss0", loss.detach())
    for name, parameter in network.named_parameters():
        if f"grad.{name}" in want:
            assert parameter.grad is not None
            check(f"grad.{name}", parameter.grad)
    with torch.no_grad():
        network(x[0])
        for name, buffer in network.named_buffers():
            if f"buffer_after2.{name}" in want and name.endswith(("mean", "var")):
                check(f"buffer_after2.{name}", buffer)
        network.eval()
        check("logits_eval", network(x[1]))


def small_network(backend: str, **arguments: Any) -> Network:
    torch.manual_seed(0)
    network = Network(8, 3, 3, F.cross_entropy, backend=backend, **arguments)
    for parameter in network.arch_parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("step", ["alpha", "weight"])
def test_gradients_nobody_asks_for_are_not_computed(
    compiled: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = small_network(compiled)
    full = small_network("reference")
    x = torch.randn(4, 3, 8, 8)
    F.cross_entropy(full(x), torch.arange(4) % 3).backward()
    alphas, weights = network.arch_parameters(), network.weight_parameters()
    for parameter in alphas if step == "weight" else weights:
        parameter.requires_grad_(False)
    room: list[bool] = []
    original = Arrays.__init__

    def spy(self: Arrays, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        room.append(self.weights.grad is not None)

    monkeypatch.setattr(Arrays, "__init__", spy)
    loss = F.cross_entropy(network(x), torch.arange(4) % 3)
    room.clear()
    loss.backward()
    assert set(room) == {step == "weight"}
    trained = alphas if step == "alpha" else weights
    wanted = full.arch_parameters() if step == "alpha" else full.weight_parameters()
    for got, want in zip(trained, wanted, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)


def test_opcheck(compiled: str, make_case: Any) -> None:
    cell, (s0, s1, weights) = make_case(live=3).cell().float(), make_case(live=3).inputs()
    names = fused.Names(cell)
    arguments = (
        s0.float().requires_grad_(),
        s1.float(),
        weights.float().requires_grad_(),
        [module.weight for module in names.convolutions],
        [],
        torch.zeros(1),
        torch.zeros(2, dtype=torch.int64),
        names.key,
        compiled,
        True,
        torch.float32,
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pdarts_fast.cell_forward, arguments, test_utils=tests)
    stats = torch.rand(fused.plans.from_key(names.key).num_slots + 2, 2, 8).double()
    running = [b for norm in names.norms for b in (norm.running_mean, norm.running_var)]
    batches = [norm.num_batches_tracked for norm in names.norms]
    update = (running, batches, stats, names.key, [72, 72])
    torch.library.opcheck(torch.ops.pdarts_fast.update_running, update, test_utils=tests)


def test_compiles_without_a_graph_break(compiled: str) -> None:
    network = small_network(compiled)
    twin = copy.deepcopy(network)
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    traced = torch.compile(network, backend="aot_eager", fullgraph=True)
    got, want = traced(x), twin(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    got.sum().backward()
    want.sum().backward()
    for name, parameter in network.named_parameters():
        twin_grad = twin.get_parameter(name).grad
        assert (parameter.grad is None) == (twin_grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, twin_grad, rtol=1e-4, atol=1e-5)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-5, atol=1e-6)


def test_exports(compiled: str) -> None:
    network = small_network(compiled).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(network, (x,), strict=False)
    nodes = [str(node.target) for node in program.graph.nodes]
    assert sum("cell_forward" in name for name in nodes) == 3
    torch.testing.assert_close(program.module()(x), network(x))


def test_double_backward_is_refused(compiled: str, make_case: Any) -> None:
    case = make_case(live=3)
    cell, (s0, s1, weights) = case.cell().float(), [x.float() for x in case.inputs()]
    s1.requires_grad_()
    out = fused.run(compiled, cell, s0, s1, weights)
    (grad,) = torch.autograd.grad(out.sum(), s1, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        grad.sum().backward()


def test_backward_twice_over_one_graph(compiled: str, make_case: Any) -> None:
    case = make_case(live=5)
    cell, (s0, s1, weights) = case.cell().float(), [x.float() for x in case.inputs()]
    s1.requires_grad_()
    out = fused.run(compiled, cell, s0, s1, weights).square().sum()
    first = torch.autograd.grad(out, s1, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, s1)[0])


def test_copies_of_a_network_have_statistics_of_their_own(compiled: str) -> None:
    network = small_network(compiled)
    x = torch.randn(2, 3, 8, 8)
    network(x)
    twin = copy.deepcopy(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    twin(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_kernels_refuse_arrays_with_gaps(compiled: str) -> None:
    from pdarts_fast.kernels.cpu.primitives import pixel_stride

    with pytest.raises(ValueError, match="channels-last"):
        pixel_stride(torch.zeros(2, 8, 4, 4).permute(0, 2, 3, 1))
    assert pixel_stride(torch.zeros(2, 4, 4, 8)[..., 2:4]) == 8
    assert Reference().channels(7) == 7
