"""A fused cell against the published graph, operation by operation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "stage1-normal": {},
    "stage1-reduction": {"reduction": True, "height": 8, "width": 8},
    "after-reduction": {"reduction_prev": True},
    "both": {"reduction": True, "reduction_prev": True, "live": 5},
    "stage2-odd": {"live": 5, "height": 5, "width": 7},
    "stage3-odd-reduction": {"live": 3, "reduction": True, "height": 7, "width": 5},
    "one-op": {"live": 1, "channels": 16},
    "c1": {"channels": 1, "height": 5, "width": 5, "batch": 3},
    "c12-reduction": {"channels": 12, "reduction": True},
    "c24": {"channels": 24, "batch": 3},
    "c64-batch1": {"channels": 64, "batch": 1, "live": 3},
    "one-pixel-wide": {"height": 9, "width": 1},
    "wide": {"height": 2, "width": 70, "live": 3},
    "evaluation": {"training": False},
    "evaluation-reduction": {"training": False, "reduction": True, "reduction_prev": True},
    "dropout": {"dropout": 0.4},
    "dropout-c6": {"dropout": 0.7, "channels": 6, "height": 5, "width": 3},
    "dropout-evaluation": {"dropout": 0.4, "training": False},
    "many-images": {"batch": 37, "height": 4, "width": 4, "live": 3},
}
# float32: a few roundings of sums over a hundred pixels. bfloat16 keeps 8 bits, and a cell chains
# four roundings.
FLOAT32, BFLOAT16 = 5e-5, 6e-2


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_float64_is_exact(make_case: Any, run: Any, close: Any, arguments: dict[str, Any]) -> None:
    case = make_case(**arguments)
    cell, inputs = case.cell(), case.inputs()
    want = run(cell, inputs, "op-by-op", torch.float64)
    close(run(cell, inputs, "reference", torch.float64), want, 1e-10)


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_float32(
    make_case: Any, run: Any, close: Any, primitives: str, arguments: dict[str, Any]
) -> None:
    case = make_case(**arguments)
    cell, inputs = case.cell(), case.inputs()
    want = run(cell, inputs, "op-by-op", torch.float64)
    close(run(cell, inputs, primitives, torch.float32), want, FLOAT32)


@pytest.mark.parametrize("name", ["stage1-normal", "both", "dropout", "evaluation"])
def test_amp_is_as_close_as_torch(
    make_case: Any, run: Any, off: Any, primitives: str, name: str
) -> None:
    case = make_case(**{**CASES[name], "batch": 8})
    cell, inputs = case.cell(), case.inputs()
    want = run(cell, inputs, "op-by-op", torch.float64)
    torch_amp = run(cell, inputs, "op-by-op", torch.bfloat16)
    got = run(cell, inputs, primitives, torch.bfloat16)
    for key in ("out", "s0", "s1", "weights"):
        allowed = 2 * off(torch_amp[key], want[key]) + BFLOAT16
        assert off(got[key], want[key]) <= allowed, key


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    channels=st.integers(2, 20),
    live=st.integers(1, 8),
    batch=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_and_switch_table(
    make_case: Any,
    run: Any,
    close: Any,
    compiled: str,
    channels: int,
    live: int,
    batch: int,
    height: int,
    width: int,
    flags: tuple[bool, bool, bool],
    dropout: float,
    seed: int,
) -> None:
    reduction, reduction_prev, training = flags
    case = make_case(
        channels, live, reduction, reduction_prev, batch, height, width, dropout, training, seed
    )
    # A BatchNorm over a handful of pixels amplifies rounding without bound: compare those in
    # evaluation mode.
    pixels = batch * (-(-height // 2) * -(-width // 2) if reduction else height * width)
    if pixels < 16:
        case = make_case(
            channels, live, reduction, reduction_prev, batch, height, width, 0.0, False, seed
        )
    cell, inputs = case.cell(), case.inputs()
    want = run(cell, inputs, "op-by-op", torch.float64)
    close(run(cell, inputs, compiled, torch.float32), want, 2e-4)


def test_large_means_lose_no_digits(make_case: Any, run: Any, close: Any, compiled: str) -> None:
    """Inputs whose mean is 100 times their deviation: uncentred sums of squares would fail."""
    case = make_case(batch=4)
    cell, (s0, s1, weights) = case.cell(), case.inputs()
    inputs = (s0 * 0.01 + 1, s1 * 0.01 + 1, weights)
    want = run(cell, inputs, "op-by-op", torch.float64)
    got = run(cell, inputs, compiled, torch.float32)
    torch32 = run(cell, inputs, "op-by-op", torch.float32)
    for name in ("out", "weights"):
        allowed = 3 * (torch32[name] - want[name]).abs().max() + 1e-5 * want[name].abs().max()
        assert (got[name] - want[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("layout", ["sliced", "channels-last", "transposed"])
def test_any_memory_layout(
    make_case: Any, run: Any, close: Any, compiled: str, layout: str
) -> None:
    case = make_case()
    cell, (s0, s1, weights) = case.cell(), case.inputs()
    want = run(cell, (s0, s1, weights), compiled, torch.float32)
    if layout == "sliced":
        s1 = torch.cat([s1, s1], dim=1)[:, : s1.shape[1]]
    elif layout == "channels-last":
        s0, s1 = (s.to(memory_format=torch.channels_last) for s in (s0, s1))
    else:
        s1 = s1.transpose(2, 3).contiguous().transpose(2, 3)
    close(run(cell, (s0, s1, weights), compiled, torch.float32), want, 0.0)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "amp"])
def test_bitwise_repeatable_at_any_number_of_threads(
    make_case: Any, run: Any, compiled: str, reduction: bool, dtype: torch.dtype
) -> None:
    case = make_case(channels=16, batch=9, reduction=reduction, dropout=0.3)
    cell, inputs = case.cell(), case.inputs()
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(cell, inputs, compiled, dtype))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name
