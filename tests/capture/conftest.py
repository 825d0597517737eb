"""Steps of tiny networks, run eagerly and from traces, and batches for them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

from pdarts_fast import optimizers
from pdarts_fast.config import SearchConfig
from pdarts_fast.kernels import backends
from pdarts_fast.precision import Precision
from pdarts_fast.search_space import all_switches
from pdarts_fast.step import SearchStep
from pdarts_fast.supernet import Network

CPU = torch.device("cpu")
LIVE = {1: 8, 2: 5, 3: 3}
"""Live operations an edge in each stage."""
# Nodes of a cell: one has every operation and both strides; two read one another.
NODES = {"reference": 1, "cpu": 2}


@pytest.fixture
def quick_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what tracing notes of every node and replays do not need: most of its time."""
    monkeypatch.setattr(proxy_tensor, "extract_val", lambda *_, **__: None)
    monkeypatch.setattr(traceback, "extract_stack", lambda *_, **__: traceback.StackSummary())


@pytest.fixture
def fused_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernels, which a step runs on CUDA, on this device too."""
    place = optimizers._TensorRate._place_rate
    monkeypatch.setattr(
        optimizers._TensorRate, "_place_rate", lambda self, lr, _: place(self, lr, True)
    )


def switches(stage: int, nodes: int) -> dict[str, np.ndarray]:
    """Tables with the live operations of a stage, other ones on every edge."""
    tables = all_switches(nodes)
    for number, table in enumerate(tables.values()):
        for edge, row in enumerate(table):
            row[:] = False
            row[[(3 * edge + number + k) % 8 for k in range(LIVE[stage])]] = True
    return tables


@pytest.fixture
def make_step(one_thread: None) -> Callable[..., SearchStep]:
    """Makes the step of a stage; the same at every call."""

    def make(
        stage: int = 3,
        backend: str = "reference",
        *,
        amp: bool = False,
        precision: Precision | None = None,
        device: torch.device = CPU,
        **settings: Any,
    ) -> SearchStep:
        if backend == "cpu" and not backends.available()["cpu"].usable:
            pytest.skip(backends.available()["cpu"].reason)
        torch.manual_seed(stage)
        np.random.seed(stage)
        nodes = NODES.get(backend, 4)
        tables = switches(stage, nodes)
        network = Network(
            2, 3, 3, nn.functional.cross_entropy, steps=nodes, multiplier=nodes,
            switches_normal=tables["normal"], switches_reduce=tables["reduce"],
            p=0.5, backend=backend,
        ).to(device)  # fmt: skip
        for alphas in network.arch_parameters():
            nn.init.normal_(alphas)
        config = SearchConfig(amp=amp, **settings)
        return SearchStep(network.train(), config, device, precision=precision)

    return make


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """Makes a batch from its seed."""

    def make(seed: int, size: int = 4, side: int = 8) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 3, side, side, generator=generator)
        return images, torch.randint(3, (size,), generator=generator)

    return make


@pytest.fixture
def gpu() -> torch.device:
    """A GPU, or a skip that says what is missing."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU and a torch built for it")
    return torch.device("cuda")
