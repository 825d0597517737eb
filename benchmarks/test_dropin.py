"""Time of a search step of an existing script: as it is, and accelerated.

Run with ``pytest benchmarks/test_dropin.py --benchmark-only``. Both are timed interleaved in one
process, so that a busy machine slows both; ``extra_info`` has the ratio of the medians, the time
that ``accelerate`` took and the differences of the gradients.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pdarts_fast.dropin import accelerate
from pdarts_fast.kernels import backends
from pdarts_fast.run.environment import hardware, versions

TESTS = Path(__file__).parent.parent / "tests" / "dropin"
IMAGE_SIDE, CLASSES, ROUNDS = 32, 10, 5

STAGES = {
    "stage1-8-ops": {"layers": 5, "live": 8, "p": 0.0},
    "stage2-5-ops-dropout": {"layers": 5, "live": 5, "p": 0.4},
    "stage3-3-ops-dropout": {"layers": 5, "live": 3, "p": 0.7},
}


def model_search() -> ModuleType:
    """The P-DARTS-style ``model_search`` of the tests."""
    spec = importlib.util.spec_from_file_location("dropin_conftest", TESTS / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    sys.modules["dropin_conftest"] = helpers
    spec.loader.exec_module(helpers)
    return helpers.load_model_search(TESTS / "scripts" / "first_order")


def table(live: int) -> list[list[bool]]:
    """Which operations live: so many random ones an edge."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(14):
        kept = set(rng.permutation(8)[:live].tolist())
        rows.append([op in kept for op in range(8)])
    return rows


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """Forward and backward, as a script's weight step and alpha step have it."""

    def run() -> float:
        torch.manual_seed(0)
        model.zero_grad()
        started = time.perf_counter()
        model._loss(images, labels).backward()  # type: ignore[operator,union-attr]
        return time.perf_counter() - started

    return run


def gradient_errors(plain: nn.Module, fast: nn.Module) -> list[float]:
    """Largest difference of every gradient, relative to the largest of its parameter.

    A ReLU that flips at a tie changes some of them by a percent; the median is free of that.
    """
    errors = []
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            scale = p.grad.abs().max().clamp_min(1e-12)
            errors.append(((p.grad - q.grad).abs().max() / scale).item())
    return errors


@pytest.mark.parametrize("batch", [32], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_search_step(benchmark: Any, stage: dict[str, Any], batch: int) -> None:
    found = backends.available()["cpu"]
    if not found.usable:
        pytest.skip(f"needs backend cpu: {found.reason}")
    torch.manual_seed(0)
    np.random.seed(0)
    alive = table(stage["live"])
    plain = model_search().Network(
        16,
        CLASSES,
        stage["layers"],
        nn.CrossEntropyLoss(),
        switches_normal=alive,
        switches_reduce=alive,
        p=stage["p"],
    )
    started = time.perf_counter()
    fast = accelerate(copy.deepcopy(plain))
    setup = time.perf_counter() - started
    images = torch.randn(batch, 3, IMAGE_SIDE, IMAGE_SIDE)
    labels = torch.randint(0, CLASSES, (batch,))
    steps = {"plain": step(plain, images, labels), "fast": step(fast, images, labels)}
    for run in steps.values():
        run()
    errors = gradient_errors(plain, fast)
    median_error = statistics.median(errors)
    assert median_error < 2e-3, f"gradients are off by {median_error:.1e}"
    times: dict[str, list[float]] = {name: [] for name in steps}

    def interleaved() -> None:
        for name, run in steps.items():
            times[name].append(run())

    benchmark.pedantic(interleaved, rounds=ROUNDS, iterations=1)
    median = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info.update(
        ratio=median["plain"] / median["fast"],
        plain_seconds=median["plain"],
        fast_seconds=median["fast"],
        accelerate_seconds=setup,
        median_gradient_error=median_error,
        worst_gradient_error=max(errors),
        threads=torch.get_num_threads(),
        hardware=hardware(torch.device("cpu"), "cpu"),
        versions=versions(),
    )
