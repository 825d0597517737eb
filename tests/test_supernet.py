"""The supernet on the reference backend, against numbers of the published program in float64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import PRIMITIVES
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.backends import Availability
from pdarts_fast.operations import FactorizedReduce, ReLUConvBN
from pdarts_fast.supernet import Cell, MixedOp, Network

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "golden"
STAGES = pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda stage: f"stage{stage}")
ALL = [[True] * len(PRIMITIVES)] * 14
NOTHING = [[False] * len(PRIMITIVES)] * 14
NO_SKIPS = [[name != "skip_connect" for name in PRIMITIVES]] * 14


class Golden:
    """One golden file: its configuration, its tensors and a network in its initial state."""

    def __init__(self, stage: int) -> None:
        path = GOLDEN / f"supernet_stage{stage}.safetensors"
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.tensors: dict[str, Tensor] = load_file(path)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def network(self) -> Network:
        network = Network(
            self.config["C"],
            self.config["num_classes"],
            self.config["layers"],
            F.cross_entropy,
            switches_normal=self.config["switches_normal"],
            switches_reduce=self.config["switches_reduce"],
            backend="reference",
        ).double()
        network.load_state_dict(self.group("init."))
        return network


@pytest.fixture(scope="module")
def golden() -> Any:
    files: dict[int, Golden] = {}
    return lambda stage: files.setdefault(stage, Golden(stage))


def assert_matches(got: Tensor, want: Tensor, name: str) -> None:
    """Equal to 1e-9 of the largest wanted value (1e-14 where that is zero)."""
    assert got.shape == want.shape, name
    error = (got - want).abs().max().item()
    assert error <= 1e-9 * want.abs().max().item() + 1e-14, f"{name}: off by {error:.2e}"


def small_network(**arguments: Any) -> Network:
    """C=2, 3 classes, 3 cells, unless told otherwise."""
    defaults: dict[str, Any] = {"C": 2, "num_classes": 3, "layers": 3, "backend": "reference"}
    return Network(**{**defaults, "criterion": F.cross_entropy, **arguments})


@STAGES
def test_state_dict_has_the_stock_names_and_shapes(golden: Any, stage: int) -> None:
    want = {name: tensor.shape for name, tensor in golden(stage).group("init.").items()}
    got = {name: tensor.shape for name, tensor in golden(stage).network().state_dict().items()}
    assert got == want


@STAGES
def test_training_forward_loss_and_every_gradient(golden: Any, stage: int) -> None:
    file = golden(stage)
    network = file.network()
    x, y = file.tensors["x"][0], file.tensors["y"][0]
    assert_matches(network(x), file.tensors["logits0"], "logits")
    network = file.network()
    loss = network._loss(x, y)
    loss.backward()
    assert_matches(loss, file.tensors["loss0"], "loss")
    want = file.group("grad.")
    assert set(want) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert_matches(parameter.grad, want[name], name)


@STAGES
def test_running_statistics_and_evaluation(golden: Any, stage: int) -> None:
    file = golden(stage)
    network = file.network()
    with torch.no_grad():
        network(file.tensors["x"][0])
        network(file.tensors["x"][0])
    state = network.state_dict()
    want = file.group("buffer_after2.")
    assert set(want) == {name for name in state if "running" in name or "tracked" in name}
    for name, tensor in want.items():
        assert_matches(state[name], tensor, name)
    network.eval()
    assert_matches(network(file.tensors["x"][1]), file.tensors["logits_eval"], "logits_eval")


@STAGES
def test_bilevel_trajectory(golden: Any, stage: int) -> None:
    file = golden(stage)
    network = file.network()
    alphas, weights = network.arch_parameters(), network.weight_parameters()
    optimisers = (
        (alphas, torch.optim.Adam(alphas, lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)),
        (weights, torch.optim.SGD(weights, lr=0.025, momentum=0.9, weight_decay=3e-4)),
    )
    losses = []
    for batch, (x, y) in enumerate(zip(file.tensors["x"], file.tensors["y"], strict=True)):
        parameters, optimiser = optimisers[batch % 2]
        network.zero_grad()
        loss = network._loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        losses.append(loss.detach())
    want = file.group("trajectory.")
    assert_matches(torch.stack(losses), want.pop("losses"), "losses")
    assert {"alphas_normal", "alphas_reduce", "stem.0.weight", "classifier.weight"} <= set(want)
    for name, tensor in want.items():
        assert_matches(network.get_parameter(name).detach(), tensor, name)


def test_alphas_come_from_numpy_after_the_weights_normal_first() -> None:
    np.random.seed(7)
    network = small_network()
    np.random.seed(7)
    want = [(1e-3 * np.random.randn(14, 8)).astype(np.float32) for _ in range(2)]
    for parameter, values in zip(network.arch_parameters(), want, strict=True):
        assert parameter.dtype == torch.float32
        np.testing.assert_array_equal(parameter.detach().numpy(), values)


def test_building_a_network_draws_from_torch_only_for_its_weights() -> None:
    torch.manual_seed(3)
    first = small_network(p=0.5)
    torch.manual_seed(3)
    second = small_network(p=0.0)
    for name, parameter in second.named_parameters():
        if not name.startswith("alphas"):
            assert torch.equal(first.get_parameter(name), parameter), name


def test_parameter_lists_share_nothing_and_cover_everything() -> None:
    network = small_network()
    alphas, weights = network.arch_parameters(), network.weight_parameters()
    assert [id(alpha) for alpha in alphas] == [
        id(network.alphas_normal),
        id(network.alphas_reduce),
    ]
    ids = [id(parameter) for parameter in [*alphas, *weights]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in network.parameters()}


@pytest.mark.parametrize(
    ("layers", "reductions"),
    [(3, {1, 2}), (5, {1, 3}), (8, {2, 5}), (11, {3, 7}), (17, {5, 11})],
    ids=lambda value: f"{value}cells" if isinstance(value, int) else "",
)
def test_reductions_at_a_third_and_two_thirds(layers: int, reductions: set[int]) -> None:
    one_op = [[name == "max_pool_3x3" for name in PRIMITIVES]] * 14
    network = small_network(layers=layers, switches_normal=one_op, switches_reduce=one_op)
    cells = [cast(Cell, cell) for cell in network.cells]
    assert {cell.index for cell in cells if cell.reduction} == reductions
    for index, cell in enumerate(cells):
        channels = 2 * 2 ** sum(at <= index for at in reductions)
        assert channels == cell.C
        after_reduction = index - 1 in reductions
        kind = FactorizedReduce if after_reduction else ReLUConvBN
        assert isinstance(cell.preprocess0, kind), index
        assert isinstance(cell.preprocess1, ReLUConvBN), index
        for node, source, stride in cell.edges:
            assert source < 2 + node
            assert stride == (2 if cell.reduction and source < 2 else 1)


def test_one_live_op_takes_its_softmax_over_the_edges() -> None:
    one_op = [[name == "sep_conv_3x3" for name in PRIMITIVES]] * 14
    network = small_network(switches_normal=one_op, switches_reduce=one_op)
    weights = network._edge_weights(network.alphas_normal)
    assert weights.shape == (14, 1)
    assert torch.allclose(weights, torch.softmax(network.alphas_normal, dim=0))
    assert torch.isclose(weights.sum(), torch.tensor(1.0))


def test_the_weight_of_none_scales_an_edge_but_adds_nothing() -> None:
    torch.manual_seed(0)
    edge = MixedOp(2, 1, [name in ("none", "skip_connect") for name in PRIMITIVES])
    x, weights = torch.randn(2, 2, 5, 5), torch.tensor([0.75, 0.25])
    torch.testing.assert_close(edge(x, weights), 0.25 * x)


@pytest.mark.parametrize("size", [(32, 32), (17, 13), (9, 16)], ids=lambda size: f"{size[0]}x")
def test_odd_image_sizes_run_through_both_reductions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = small_network()
    assert network(torch.randn(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def test_one_channel_batch_of_two_in_each_memory_layout(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = small_network(C=1).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = network(x)
    network.to(memory_format=layout)
    torch.testing.assert_close(network(x.to(memory_format=layout)), want, rtol=1e-9, atol=1e-12)


def uneven() -> np.ndarray:
    table = np.ones((14, 8), dtype=bool)
    table[3, 0] = False
    return table


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no_channel": ({"C": 0}, "C must be at least 1, got 0"),
    "no_class": ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    "two_layers": ({"layers": 2}, "layers must be at least 3 .*got 2"),
    "multiplier": ({"multiplier": 5}, "multiplier must be 1 to steps=4, got 5"),
    "ten_steps": ({"steps": 10}, "steps=10 gives 65 edges"),
    "p_one": ({"p": 1.0}, "skip dropout p must be in 0 <= p < 1, got 1.0"),
    "p_negative": ({"p": -0.1}, "skip dropout p must be in 0 <= p < 1, got -0.1"),
    "p_nan": ({"p": float("nan")}, "skip dropout p must be in 0 <= p < 1, got nan"),
    "13_edges": ({"switches_normal": ALL[1:]}, "no cell has 13 edges"),
    "edges_of_other_steps": (
        {"steps": 3, "multiplier": 3, "switches_normal": ALL, "switches_reduce": ALL},
        "14 edges, steps=3 has 9",
    ),
    "7_primitives": ({"switches_reduce": [[True] * 7] * 14}, r"reduce is bool \[14, 7\]"),
    "one_edge_differs": ({"switches_normal": uneven()}, "7 to 8 live ops on an edge"),
    "cell_types_differ": ({"switches_normal": NO_SKIPS}, "7 to 8 live ops on an edge"),
    "nothing_alive": (
        {"switches_normal": NOTHING, "switches_reduce": NOTHING},
        "0 to 0 live ops on an edge",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        small_network(**arguments)
    assert "\n" not in str(error.value)


def test_an_unusable_backend_is_refused_when_building() -> None:
    with pytest.raises(UsageError, match="--backend nonsense"):
        small_network(backend="nonsense")


def test_another_backend_is_handed_every_cell_with_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def run_cell(cell: Cell, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        calls.append((cell.index, cell.backend, tuple(weights.shape)))
        return cell.forward_op_by_op(s0, s1, weights)

    plugged = SimpleNamespace(
        availability=lambda: Availability(True, "test"),
        run_cell=run_cell,
        prepare_cell=lambda cell: None,
    )
    monkeypatch.setattr(backends, "load", {"cpu": plugged}.get)
    torch.manual_seed(0)
    network = small_network(backend="cpu")
    reference = small_network()
    reference.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(x), reference(x))
    assert calls == [(index, "cpu", (14, 8)) for index in range(3)]
    assert network.backend == "cpu"


def test_auto_backend_is_resolved_and_repr_tells_the_stage() -> None:
    network = small_network(p=0.25, backend="auto")
    assert network.backend in ("reference", "cpu")
    assert "C=2, layers=3, ops=8, p=0.25, backend=auto" in repr(network)


def test_a_caller_changing_its_switch_table_changes_no_network() -> None:
    table = np.ones((14, 8), dtype=bool)
    network = small_network(switches_normal=table)
    table[:] = False
    assert network.switches_normal.all()
