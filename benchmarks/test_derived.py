"""Training step of a derived network and its cells: stock modules against fused cells.

Run with ``pytest benchmarks/test_derived.py --benchmark-only``. Rivals are timed in turns in one
process, so that a busy machine slows all of them; ``extra_info`` has the ratios of the best times
and of the medians, and the difference of the gradients.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import Cell, NetworkCIFAR
from pdarts_fast.run.environment import hardware

AUXILIARY_WEIGHT = 0.4
# Largest error of the gradients, as a multiple of that of the stock modules.
LARGEST_ERROR = 2.0

Step = Callable[[], float]


def clock() -> float:
    """Seconds of processor time on one thread, which no neighbour disturbs; else of wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def network_step(network: NetworkCIFAR, images: Tensor, labels: Tensor) -> Step:
    """Forward and backward pass of a training step."""

    def run() -> float:
        torch.manual_seed(0)
        network.zero_grad(set_to_none=True)
        started = clock()
        logits, logits_aux = network(images)
        loss = F.cross_entropy(logits, labels)
        (loss + AUXILIARY_WEIGHT * F.cross_entropy(logits_aux, labels)).backward()
        return clock() - started

    return run


def gradient_errors(backend: str) -> dict[str, float]:
    """Error of a smaller network's gradients against float64: by stock modules and fused.

    Median over parameters of the difference, relative in Euclidean norm; the least of three seeds,
    because a ReLU at a tie that falls the other way costs any of them three digits.
    """
    found: dict[str, list[float]] = {"reference": [], backend: []}
    for seed in range(3):
        torch.manual_seed(seed)
        exact = NetworkCIFAR(36, 10, 3, True, PDARTS)
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
        networks = {name: copy.deepcopy(exact) for name in found}
        network_step(exact.double(), images.double(), labels)()
        for name, network in networks.items():
            network.use_backend(name)
            network_step(network, images, labels)()
            pairs = zip(network.parameters(), exact.parameters(), strict=True)
            errors = [((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs]
            found[name].append(statistics.median(errors))
    return {name: min(errors) for name, errors in found.items()}


def in_turns(benchmark: Any, steps: dict[str, Step], rounds: int) -> None:
    """Times rivals in turns and records the ratios of all to ``fused``."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def turn() -> None:
        for name, run in steps.items():
            times[name].append(run())

    benchmark.pedantic(turn, rounds=rounds, iterations=1)
    for name, measured in times.items():
        benchmark.extra_info[f"{name}_best_seconds"] = min(measured)
        if name != "fused":
            best = min(measured) / min(times["fused"])
            median = statistics.median(measured) / statistics.median(times["fused"])
            benchmark.extra_info[f"{name}_ratio_of_best"] = round(best, 2)
            benchmark.extra_info[f"{name}_ratio_of_medians"] = round(median, 2)
    benchmark.extra_info["clock"] = "processor" if torch.get_num_threads() == 1 else "wall"
    benchmark.extra_info["hardware"] = hardware(torch.device("cpu"), "cpu")


@pytest.mark.parametrize("drop_path", [0.0, 0.2], ids=["no-drop-path", "drop-path"])
def test_cifar_training_step(
    benchmark: Any, machine: dict[str, Any], compiled: str, drop_path: float
) -> None:
    """C=36, 20 cells, batch 32, auxiliary head, float32."""
    torch.manual_seed(0)
    stock = NetworkCIFAR(36, 10, 20, True, PDARTS)
    stock.use_backend("reference")
    last, fused = copy.deepcopy(stock), copy.deepcopy(stock)
    last.to(memory_format=torch.channels_last)
    fused.use_backend(compiled)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    images_last = images.contiguous(memory_format=torch.channels_last)
    networks = {"stock": stock, "stock_channels_last": last, "fused": fused}
    for network in networks.values():
        network.drop_path_prob = drop_path
    steps = {
        name: network_step(network, images_last if network is last else images, labels)
        for name, network in networks.items()
    }
    for run in steps.values():
        run()
    errors = gradient_errors(compiled)
    assert errors[compiled] <= LARGEST_ERROR * errors["reference"]
    in_turns(benchmark, steps, rounds=5)
    benchmark.extra_info.update(machine)
    benchmark.extra_info["gradient_errors"] = errors


# Channels and side of the nodes, batch: every size of cell of the CIFAR, digits and ImageNet nets.
SHAPES = [
    (36, 32, 32),
    (72, 16, 32),
    (144, 8, 32),
    (12, 16, 64),
    (24, 8, 64),
    (48, 4, 64),
    (48, 28, 8),
    (96, 14, 8),
    (192, 7, 8),
    (36, 32, 1),
    (144, 8, 1),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize(
    ("channels", "side", "batch"), SHAPES, ids=[f"{c}x{s}x{s}-batch{b}" for c, s, b in SHAPES]
)
def test_cell(
    benchmark: Any,
    compiled: str,
    channels: int,
    side: int,
    batch: int,
    reduction: bool,
    training: bool,
) -> None:
    """One PDARTS cell: training is forward and backward, evaluation is forward alone."""
    from pdarts_fast.cells import derived
    from pdarts_fast.kernels import backends

    backends.load(compiled).register()
    torch.manual_seed(0)
    stock = Cell(PDARTS, 4 * channels, 4 * channels, channels, reduction, False).train(training)
    fused = copy.deepcopy(stock)
    in_side = 2 * side if reduction else side
    x = torch.randn(batch, 4 * channels, in_side, in_side)
    contiguous, last = x, x.contiguous(memory_format=torch.channels_last)
    forwards: dict[str, Callable[[], Tensor]] = {
        "stock": lambda: stock.forward_op_by_op(contiguous, contiguous, 0.0),
        "stock_channels_last": lambda: stock.forward_op_by_op(last, last, 0.0),
        "fused": lambda: derived.run(fused, compiled, last, last, 0.0),
    }
    for images in (contiguous, last):
        images.requires_grad_(training)

    def timed(forward: Callable[[], Tensor]) -> Step:
        def run() -> float:
            started = clock()
            if training:
                forward().sum().backward()
            else:
                with torch.no_grad():
                    forward()
            return clock() - started

        return run

    steps = {name: timed(forward) for name, forward in forwards.items()}
    for run in steps.values():
        run()
    in_turns(benchmark, steps, rounds=5)
