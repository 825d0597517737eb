"""The evaluation of a network against the same numbers computed directly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from pdarts_fast.cost import network_cost
from pdarts_fast.data import load_dataset
from pdarts_fast.evaluation import measure_speed, run_evaluate
from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.trained import NetworkSpec, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = NetworkSpec("cifar", 4, 3, 10, False, PDARTS)


@pytest.fixture(scope="module")
def network() -> NetworkCIFAR:
    """A network that is not trained, yet has seen some statistics."""
    torch.manual_seed(0)
    network = SPEC.build()
    assert isinstance(network, NetworkCIFAR)
    network.train()(torch.randn(16, 3, 16, 16))
    return network.eval()


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_dataset("digits", image_size=16)


@pytest.fixture(scope="module")
def weights(network: NetworkCIFAR, digits: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, network, SPEC, {"dataset": digits.facts("digits")})
    return path


def test_scores_are_those_of_a_direct_computation(
    network: NetworkCIFAR, digits: Any, weights: Path, tmp_path: Path
) -> None:
    found = run_evaluate(weights, speed=False, batch_size=50, out=tmp_path / "out.json")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (digits.mean, digits.std))
    labels = digits.test.labels
    with torch.no_grad():
        logits = network((digits.test.images / 255 - mean) / std)[0]
    assert found.scores is not None
    assert found.scores.images == 359
    assert found.scores.loss == pytest.approx(functional.cross_entropy(logits, labels).item())
    right = logits.argmax(1) == labels
    assert found.scores.accuracy == right.double().mean().item()
    five = (logits.topk(5).indices == labels[:, None]).any(1)
    assert found.scores.top5_accuracy == five.double().mean().item()
    assert found.scores.confusion.sum() == 359
    assert found.scores.confusion.trace() == right.sum()
    assert found.cost == network_cost(network, 16)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["scores"]["accuracy"] == found.scores.accuracy
    assert written["scores"]["confusion"] == found.scores.confusion.tolist()
    assert written["network"]["parameters"] == found.cost.parameters
    assert written["network"]["multiply_adds"] == found.cost.multiply_adds
    assert written["speed"] == []
    assert written["hardware"]["threads"] == 1


def test_a_published_checkpoint_gets_the_same_scores(
    network: NetworkCIFAR, weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "published.pt"
    torch.save({f"module.{name}": v for name, v in network.state_dict().items()}, path)
    ours = run_evaluate(weights, speed=False)
    theirs = run_evaluate(path, genotype="PDARTS", dataset="digits", image_size=16, speed=False)
    assert ours.scores is not None
    assert theirs.scores is not None
    assert theirs.scores.loss == ours.scores.loss
    assert torch.equal(theirs.scores.confusion, ours.scores.confusion)


def test_normalisation_is_that_of_the_training(
    network: NetworkCIFAR, digits: Any, weights: Path, tmp_path: Path
) -> None:
    facts = digits.facts("digits") | {"mean": [0.0] * 3, "std": [1.0] * 3}
    path = tmp_path / "w.safetensors"
    save_weights(path, network, SPEC, {"dataset": facts})
    found = run_evaluate(path, speed=False)
    with torch.no_grad():
        logits = network(digits.test.images / 255)[0]
    assert found.scores is not None
    want = functional.cross_entropy(logits, digits.test.labels).item()
    assert found.scores.loss == pytest.approx(want)


def test_speed_is_measured_at_each_batch_size(weights: Path) -> None:
    found = run_evaluate(weights, speed_batch_sizes=(1, 4))
    assert [speed.batch_size for speed in found.speeds] == [1, 4]
    for speed in found.speeds:
        assert speed.repeats >= 10
        assert speed.milliseconds > 0
        milliseconds = 1e3 * speed.batch_size / speed.images_per_second
        assert milliseconds == pytest.approx(speed.milliseconds)


def test_speed_is_the_median_pass() -> None:
    calls = []

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(x.shape))
            torch.ones(()).item()
            # One in ten passes is disturbed.
            if len(calls) % 10 == 0:
                import time

                time.sleep(0.2)
            return x

    speed = measure_speed(Slow(), 8, 2, torch.device("cpu"))
    assert set(calls) == {(2, 3, 8, 8)}
    assert speed.milliseconds < 100


def test_the_printed_table_has_every_figure(weights: Path, capsys: Any) -> None:
    found = run_evaluate(weights, speed=False)
    out = capsys.readouterr().out
    assert found.scores is not None
    for text in (
        f"{found.cost.parameters:,}",
        f"{found.cost.multiply_adds / 1e6:,.3f} M",
        f"top-1 {100 * found.scores.accuracy:.2f}%",
        f"top-5 {100 * found.scores.top5_accuracy:.2f}%",
        "359 images of digits",
        "confusion matrix",
    ):
        assert text in out
