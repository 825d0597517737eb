"""One step of a search, eager: weights alone, and alphas with weights, in every stage.

Backends take turns within a round, so a busy machine slows both; the ratio is in ``extra_info``.
Nothing is reported for a step whose loss or weights are wrong. ``captured`` says what a GPU gains
by replaying the same step from a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.bench import measure
from pdarts_fast.capture.cuda import CudaGraphs
from pdarts_fast.config import SearchConfig
from pdarts_fast.search_space import all_switches
from pdarts_fast.step import SearchStep
from pdarts_fast.supernet import Network

BATCH, SIDE, CHANNELS = 8, 32, 16
STAGES = {"stage1": (5, 8), "stage2": (11, 5), "stage3": (17, 3)}
KINDS = {"weights": False, "alphas-and-weights": True}


def make_step(stage: str, backend: str, device: torch.device) -> SearchStep:
    """The step of a stage with the paper's sizes; the same at every call."""
    cells, live = STAGES[stage]
    tables = all_switches()
    for table in tables.values():
        # The operations differ from edge to edge, as they do after dropping.
        for edge, row in enumerate(table):
            row[[(edge + k) % 8 for k in range(8 - live)]] = False
    torch.manual_seed(0)
    np.random.seed(0)
    network = Network(
        CHANNELS, 10, cells, nn.functional.cross_entropy, p=0.3, backend=backend,
        switches_normal=tables["normal"], switches_reduce=tables["reduce"],
    )  # fmt: skip
    return SearchStep(network.to(device).train(), SearchConfig(), device)


def make_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=device)
    return images, torch.randint(10, (BATCH,), device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_step(
    benchmark: Any, compiled: str, machine: dict[str, Any], stage: str, kind: str
) -> None:
    device = torch.device("cpu")
    batch = make_batch(device)
    alphas = make_batch(device) if KINDS[kind] else None
    steps = {name: make_step(stage, name, device) for name in (compiled, "reference")}
    for step in steps.values():
        step.run(batch, alphas, 0)
    losses = [step.epoch_meter.read()[0].loss for step in steps.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    moved = [step.network.classifier.weight for step in steps.values()]
    error = ((moved[0] - moved[1]).abs().max() / moved[1].abs().max()).item()
    assert error < 1e-3
    rivals = {name: lambda step=step: step.run(batch, alphas, 1) for name, step in steps.items()}
    timings = measure.interleaved(rivals, 1)
    benchmark.extra_info.update(machine)
    benchmark.extra_info["images"] = BATCH * (1 + KINDS[kind])
    benchmark.extra_info["error"] = error
    benchmark.extra_info["times faster than reference"] = (
        timings["reference"].median / timings[compiled].median
    )
    benchmark.pedantic(rivals[compiled], rounds=3, warmup_rounds=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_captured(benchmark: Any, machine: dict[str, Any], stage: str, kind: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU and a torch built for it")
    device = torch.device("cuda")
    batch = make_batch(device)
    alphas = make_batch(device) if KINDS[kind] else None
    steps = {name: make_step(stage, "auto", device) for name in ("eager", "captured")}
    capture = CudaGraphs(device)
    steps["captured"].capture_with(capture)

    def run(step: SearchStep) -> None:
        step.run(batch, alphas, 0)
        torch.cuda.synchronize(device)

    rivals = {name: lambda step=step: run(step) for name, step in steps.items()}
    timings = measure.interleaved(rivals, 3)
    assert not capture.broken
    benchmark.extra_info.update(machine)
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name(device)
    benchmark.extra_info["times faster than eager"] = (
        timings["eager"].median / timings["captured"].median
    )
    benchmark.pedantic(rivals["captured"], rounds=5, warmup_rounds=1)
