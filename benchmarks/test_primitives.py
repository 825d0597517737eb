"""Every primitive of a stage-1 network, as rates next to what the machine can do."""

from __future__ import annotations

from typing import Any

import pytest

from pdarts_fast.bench import primitives, rivals
from pdarts_fast.kernels import cell as fused

BATCH = 8


@pytest.mark.parametrize("stage", [1, 2, 3], ids=lambda stage: f"stage{stage}")
def test_pass_by_primitive(
    benchmark: Any, compiled: str, machine: dict[str, Any], stage: int
) -> None:
    rival = rivals.make(stage, BATCH, compiled)[compiled]
    rival.forward_backward()
    with (
        fused.primitive_by_primitive(compiled),
        primitives.recording(fused.backend_named(compiled)) as costs,
    ):
        rival.forward_backward()
    benchmark.extra_info.update(machine)
    for name, cost in costs.items():
        benchmark.extra_info[name] = {
            "seconds": cost.seconds,
            "gflops": cost.flops / cost.seconds / 1e9,
            "gbs": cost.bytes / cost.seconds / 1e9,
        }
    benchmark.pedantic(rival.forward_backward, rounds=3)
