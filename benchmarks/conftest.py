"""What every benchmark records about the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdarts_fast.bench import measure
from pdarts_fast.kernels import backends
from pdarts_fast.run.environment import cpu_name, versions


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave benchmarks out of a plain `pytest`; --benchmark-only or naming them runs them."""
    named = any("benchmarks" in str(argument) for argument in config.invocation_params.args)
    return None if named or config.getoption("benchmark_only") else True


@pytest.fixture(scope="session")
def machine() -> dict[str, Any]:
    """Processor, versions, and what a large product and a stream copy reach."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "matmul_gflops": measure.matmul_rate() / 1e9,
        "copy_gbs": measure.copy_rate() / 1e9,
    }


@pytest.fixture
def compiled() -> str:
    """``cpu``, or a skip where the C++ kernels are not built."""
    found = backends.available()["cpu"]
    if not found.usable:
        pytest.skip(found.reason)
    return "cpu"
