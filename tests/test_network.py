"""Derived networks against numbers of the published program in float64, and their own rules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pdarts_fast.errors import UsageError
from pdarts_fast.genotype import NAMED, PDARTS
from pdarts_fast.kernels import backends
from pdarts_fast.network import Cell, NetworkCIFAR, NetworkImageNet, drop_path

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES: dict[str, Any] = {"cifar": NetworkCIFAR, "imagenet": NetworkImageNet}
BOTH = pytest.mark.parametrize("data", CLASSES)
GOLDEN = Path(
    os.environ.get("PDARTS_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
)


class Golden:
    """One golden file: its configuration, its tensors and a network in its initial state."""

    def __init__(self, data: str) -> None:
        path = GOLDEN / f"derived_{data}.safetensors"
        if not path.is_file():
            pytest.skip(
                f"{path.name} is missing (9 MB at most, too large for the repository): set "
                "PDARTS_GOLDEN to the folder of golden data that holds it"
            )
        self.data = data
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
        self.tensors: dict[str, Tensor] = load_file(path)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def network(self) -> NetworkCIFAR | NetworkImageNet:
        config = self.config
        network = CLASSES[self.data](
            config["C"],
            config["num_classes"],
            config["layers"],
            config["auxiliary"],
            NAMED[config["genotype"]],
        ).double()
        network.load_state_dict(self.group("init."))
        return network


@pytest.fixture(scope="module")
def golden() -> Any:
    files: dict[str, Golden] = {}

    def load(data: str) -> Golden:
        if data not in files:
            files[data] = Golden(data)
        return files[data]

    return load


def assert_matches(got: Tensor, want: Tensor, name: str) -> None:
    """Equal to 1e-9 of the largest wanted value (1e-14 where that is zero)."""
    assert got.shape == want.shape, name
    error = (got - want).abs().max().item()
    assert error <= 1e-9 * want.abs().max().item() + 1e-14, f"{name}: off by {error:.2e}"


@BOTH
def test_state_dict_has_the_stock_names_and_shapes(golden: Any, data: str) -> None:
    want = {name: tensor.shape for name, tensor in golden(data).group("init.").items()}
    got = {name: tensor.shape for name, tensor in golden(data).network().state_dict().items()}
    assert got == want


@pytest.mark.parametrize("cells", ["modules", "operators"])
@BOTH
def test_both_logits_loss_every_gradient_and_evaluation(golden: Any, data: str, cells: str) -> None:
    file = golden(data)
    network = file.network()
    if cells == "operators":
        # float64 passes of fused cells go through the primitives of the reference.
        found = backends.available()["cpu"]
        if not found.usable:
            pytest.skip(found.reason)
        network.use_backend("cpu")
    x, y = file.tensors["x"], file.tensors["y"]
    logits, logits_aux = network(x)
    assert_matches(logits, file.tensors["logits"], "logits")
    assert_matches(logits_aux, file.tensors["logits_aux"], "logits_aux")
    weight = file.config["auxiliary_weight"]
    loss = F.cross_entropy(logits, y) + weight * F.cross_entropy(logits_aux, y)
    assert_matches(loss, file.tensors["loss"], "loss")
    loss.backward()
    want = file.group("grad.")
    assert set(want) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert_matches(parameter.grad, want[name], name)
    network.eval()
    logits, logits_aux = network(x)
    assert_matches(logits, file.tensors["logits_eval"], "logits_eval")
    assert logits_aux is None


def small(
    data: str = "cifar", auxiliary: bool = False, genotype: str = "PDARTS"
) -> NetworkCIFAR | NetworkImageNet:
    torch.manual_seed(0)
    return CLASSES[data](2, 3, 3, auxiliary, NAMED[genotype])


def images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("genotype", NAMED)
@BOTH
def test_every_named_genotype_becomes_a_network(data: str, genotype: str) -> None:
    side = {"cifar": 8, "imagenet": 64}[data]
    logits, logits_aux = small(data, genotype=genotype)(images(side))
    assert logits.shape == (2, 3)
    assert logits_aux is None


@pytest.mark.parametrize("side", [9, 15], ids=lambda side: f"{side}x{side}")
def test_odd_image_sizes(side: int) -> None:
    assert small()(images(side))[0].shape == (2, 3)


@pytest.mark.parametrize(
    ("data", "side", "fits"),
    [
        ("cifar", 32, True),
        ("cifar", 48, False),
        ("cifar", 16, False),
        ("imagenet", 224, True),
        ("imagenet", 160, False),
    ],
    ids=lambda value: str(value),
)
def test_auxiliary_head_takes_the_size_it_is_made_for(data: str, side: int, fits: bool) -> None:
    network = small(data, auxiliary=True)
    if fits:
        assert network(images(side))[1].shape == (2, 3)
        return
    with pytest.raises(ValueError, match="auxiliary head wants features of"):
        network(images(side))
    assert network.eval()(images(side))[0].shape == (2, 3)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    count, probability = 20_000, 0.3
    y = drop_path(torch.ones(count, 2, 1, 1), probability)
    assert torch.equal(y[:, 0], y[:, 1])
    values = torch.tensor([0.0, 1 / (1 - probability)])
    torch.testing.assert_close(y.unique(), values)
    dropped = (y[:, 0] == 0).sum().item()
    assert abs(dropped - count * probability) < 5 * (count * probability * (1 - probability)) ** 0.5


def test_drop_path_spares_identities_and_evaluation() -> None:
    torch.manual_seed(0)
    skips = PDARTS._replace(normal=[("skip_connect", 0), ("skip_connect", 1)] * 4)
    cell = Cell(skips, 4, 4, 4, reduction=False, reduction_prev=False)
    x = torch.randn(6, 4, 5, 5)
    assert torch.equal(cell(x, x, 0.9), cell(x, x, 0.0))
    network = small()
    want = network.eval()(images(8))[0]
    network.drop_path_prob = 0.5
    assert torch.equal(network(images(8))[0], want)


def test_drop_path_acts_in_training_and_follows_the_seed() -> None:
    network = small()
    plain = network(images(8))[0]
    network.drop_path_prob = 0.5
    torch.manual_seed(1)
    first = network(images(8))[0]
    torch.manual_seed(1)
    assert torch.equal(network(images(8))[0], first)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 10, 20, False, PDARTS), "C must be at least 2, got 1"),
        ((36, 0, 20, False, PDARTS), "num_classes must be at least 1, got 0"),
        ((36, 10, 2, False, PDARTS), "layers must be at least 3 .*got 2"),
    ],
    ids=["C", "num_classes", "layers"],
)
@BOTH
def test_bad_arguments_are_refused(data: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLASSES[data](*arguments)


def test_a_wrong_genotype_is_refused() -> None:
    wrong = PDARTS._replace(normal=[("sep_conv_9x9", 0), ("skip_connect", 1)])
    with pytest.raises(UsageError, match="sep_conv_9x9"):
        NetworkCIFAR(4, 10, 3, False, wrong)


@pytest.mark.parametrize("probability", [1.0, -0.1], ids=str)
def test_drop_path_prob_out_of_range_is_refused(probability: float) -> None:
    network = small()
    network.drop_path_prob = probability
    with pytest.raises(ValueError, match="drop_path_prob must be in 0 <= p < 1"):
        network(images(8))
