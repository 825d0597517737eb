"""Captured steps on a GPU; without one the same step function is proved in test_trace.py."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pdarts_fast.capture.cuda import CudaGraphs
from pdarts_fast.genotype import PDARTS
from pdarts_fast.network import NetworkCIFAR
from pdarts_fast.precision import Precision
from pdarts_fast.train_config import TrainConfig
from pdarts_fast.train_step import TrainStep

pytestmark = pytest.mark.gpu
Make = Callable[..., Any]
STEPS = 6


def run(step: Any, make_batch: Make, device: torch.device, sizes: tuple[int, ...] = (4,)) -> None:
    """Steps that differ in batch, kind, learning rate, dropout and mask seed."""

    def batch(seed: int, size: int) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(device) for tensor in make_batch(seed, size))

    for number in range(STEPS):
        step.set_epoch(0.05 / (number + 1), 0.5 - 0.08 * number)
        step.network.dropout_state[0] = 1000 + 7 * number
        size = sizes[number % len(sizes)]
        alphas = batch(100 + number, size) if number % 2 else None
        step.run(batch(number, size), alphas, number)


def require_close(got: Any, want: Any) -> None:
    """Equal but for the order in which cuDNN adds up."""
    for one, other in zip(got.state_tensors(), want.state_tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda stage: f"stage{stage}")
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_graphs_equal_eager_steps(
    stage: int, amp: bool, gpu: torch.device, make_step: Make, make_batch: Make
) -> None:
    eager, graphed = (make_step(stage, "reference", amp=amp, device=gpu) for _ in range(2))
    capture = CudaGraphs(gpu)
    graphed.capture_with(capture)
    run(eager, make_batch, gpu, (4, 4, 3))
    run(graphed, make_batch, gpu, (4, 4, 3))
    assert not capture.broken
    eager.prepare()
    assert graphed.first_bad_step.item() == -1
    assert graphed.epoch_meter.read()[0].images == eager.epoch_meter.read()[0].images
    if not amp:
        require_close(graphed, eager)


def test_float16_with_a_loss_scale_replays(
    gpu: torch.device, make_step: Make, make_batch: Make
) -> None:
    step = make_step(precision=Precision(torch.float16, True), device=gpu)
    step.capture_with(CudaGraphs(gpu))
    run(step, make_batch, gpu)
    assert step.first_bad_step.item() == -1
    assert all(torch.isfinite(p).all() for p in step.network.parameters())


def test_a_derived_network_draws_new_masks_at_every_replay(
    gpu: torch.device, make_batch: Make
) -> None:
    torch.manual_seed(0)
    network = NetworkCIFAR(4, 3, 3, False, PDARTS).to(gpu).train()
    step = TrainStep(network, TrainConfig(auxiliary=False, drop_path=0.3), gpu)
    step.capture_with(CudaGraphs(gpu))
    step.set_epoch(0.0, 0.5)
    images, labels = (tensor.to(gpu) for tensor in make_batch(0))
    losses = []
    for number in range(4):
        step.interval_meter.reset()
        step.run(images, labels, number)
        losses.append(step.interval_meter.read()[0].loss)
    assert len(set(losses)) > 1


def test_memory_of_graphs_is_given_back(
    gpu: torch.device, make_step: Make, make_batch: Make
) -> None:
    step = make_step(device=gpu)
    step.prepare()
    before = torch.cuda.memory_allocated(gpu)
    step.capture_with(CudaGraphs(gpu))
    run(step, make_batch, gpu)
    step.close()
    assert torch.cuda.memory_allocated(gpu) <= 1.2 * before + 2**20


def test_a_host_read_makes_steps_eager_with_a_warning(
    gpu: torch.device, make_step: Make, make_batch: Make, caplog: pytest.LogCaptureFixture
) -> None:
    step = make_step(device=gpu)
    step.average_gradients = lambda parameters: sum(p.grad.sum().item() for p in parameters)
    step.capture_with(CudaGraphs(gpu))
    with caplog.at_level(logging.WARNING):
        run(step, make_batch, gpu)
    assert sum("--no-cuda-graphs" in message for message in caplog.messages) == 1
    assert step.first_bad_step.item() == -1


def test_a_search_runs_from_graphs(gpu: torch.device, tiny: Any, tmp_path: Path) -> None:
    flags = ["--device", "cuda", "--cells", "3", "--ops-kept", "8", "--skip-dropout", "0.3"]
    command = [sys.executable, "-m", "pdarts_fast", *tiny(tmp_path / "run", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be captured" not in done.stderr
