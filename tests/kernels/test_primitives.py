"""Every primitive of the kernels against its plain torch version in float64, on any arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels import plan
from pdarts_fast.kernels.calls import Call
from pdarts_fast.kernels.interface import Arrays
from pdarts_fast.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread", "kernels")

KERNELS = "triton" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cpu"

SIZES = {
    "8x8": (3, 8, 8),
    "odd": (2, 5, 7),
    "one-row": (1, 1, 11),
    "one-column": (2, 9, 1),
    "wide": (1, 3, 67),
}
CHANNELS = [16, 48]


Run = Callable[[Any, Arrays, Callable[[Tensor], Tensor]], dict[str, Tensor]]


def compare(bench: Any, run: Run, tolerance: float = 2e-5, **kwargs: Any) -> None:
    """Runs a primitive of both sets; every tensor that ``run`` returns must agree."""
    exact = bench.arrays(torch.float64, **kwargs)
    want = run(Reference(), exact, lambda x: x.clone())
    arrays = bench.arrays(torch.float32, **kwargs)
    got = run(fused.backend_named(KERNELS), arrays, lambda x: x.float().contiguous())
    for name, value in want.items():
        scale = value.abs().max().clamp_min(1e-3)
        off = ((got[name].double() - value).abs().max() / scale).item()
        assert off <= tolerance, f"{name}: {off:.1e}"


@pytest.fixture(params=[False, True], ids=["normal", "reduction"])
def reduction(request: Any) -> bool:
    return request.param


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def size(request: Any) -> tuple[int, int, int]:
    return request.param


@pytest.fixture(params=CHANNELS, ids=lambda c: f"c{c}")
def bench(
    request: Any, size: tuple[int, int, int], reduction: bool, make_bench: Callable[..., Any]
) -> Any:
    return make_bench(request.param, size, reduction)


def test_fan_out(bench: Any) -> None:
    call = bench.calls.leave[0]

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        sums = bench.sums_like(call, 2, bench.channels)
        backend.fan_out(call, arrays, arrays.states[0], sums)
        return {
            "y": arrays.y[call.places(arrays.y.device).slots],
            "mean": sums[:, 0],
            "variance": sums[:, 1],
        }

    compare(bench, run)


@pytest.mark.parametrize("which", [0, 1], ids=["factorized", "pointwise"])
def test_inputs(bench: Any, which: int) -> None:
    call = bench.calls.inputs[which]
    batch, height, width, channels = bench.larger
    divisor = 2 if which == 0 else 1
    x = bench.random(batch, height, width, (2, 4)[which] * channels)
    shape = (batch, -(-height // divisor), -(-width // divisor), channels)
    coef, grad, y = bench.random(1, 3, channels), bench.random(*shape), bench.random(1, *shape)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        arrays.y, arrays.grads = cast(y), [cast(grad)]
        sums, out = bench.sums_like(call, 2, channels), cast(x)
        backend.fan_in(call, arrays, cast(x), cast(coef), None, out)
        backend.fan_out(call, arrays, cast(x), sums)
        assert arrays.weights.grad is not None
        return {"y": arrays.y, "moments": sums, "dx": out, "dw": arrays.weights.grad}

    compare(bench, run)


def test_mid(bench: Any) -> None:
    call = bench.calls.second[1]
    scale, shift = bench.random(len(call.items), bench.channels), bench.random(1, bench.channels)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        sums = bench.sums_like(call, 2, bench.channels)
        shifts = cast(shift.expand(scale.shape))
        backend.mid(call, arrays, cast(scale), shifts, sums)
        return {
            "y": arrays.y[call.places(arrays.y.device).slots],
            "mean": sums[:, 0],
            "variance": sums[:, 1],
        }

    compare(bench, run)


def test_affine(bench: Any) -> None:
    scale, shift = bench.random(bench.channels), bench.random(bench.channels) + 1

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        backend.affine_(arrays.states[0], cast(scale), cast(shift))
        return {"state": arrays.states[0]}

    compare(bench, run)


def test_mix_and_its_dropout(make_bench: Callable[..., Any]) -> None:
    bench = make_bench(16, (3, 6, 5), reduction=False)
    call = bench.calls.both[3]
    scale, shift = bench.random(len(call.items), 16), bench.random(16)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        nodes = torch.zeros(3, 6, 5, 64, dtype=arrays.y.dtype)
        backend.mix(call, arrays, cast(scale), cast(shift), nodes[..., 16:32])
        return {"nodes": nodes}

    compare(bench, run)


def test_reduce(bench: Any) -> None:
    if bench.plan.reduction:
        pytest.skip("skips of a reduction cell's inputs have no batch of their own size")
    call = bench.calls.both[2]
    scale, shift = bench.random(len(call.items), bench.channels), bench.random(1, bench.channels)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        sums = torch.zeros(1 + len(call.items), bench.channels, dtype=torch.float64)
        shifts = cast(shift.expand(scale.shape))
        backend.reduce(call, arrays, arrays.grads[2], cast(scale), shifts, sums)
        return {"sums": sums}

    compare(bench, run)


@pytest.mark.parametrize("want_gradients", [True, False], ids=["weights", "no-weights"])
def test_mid_backward(bench: Any, want_gradients: bool) -> None:
    call = bench.calls.enter_second[3][1]
    scale, shift = bench.random(len(call.items), bench.channels), bench.random(1, bench.channels)
    coef = bench.random(len(call.items), 3, bench.channels)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        sums = bench.sums_like(call, 2, bench.channels)
        shifts = cast(shift.expand(scale.shape))
        backend.mid_backward(call, arrays, cast(scale), shifts, cast(coef), sums)
        assert arrays.half_grads is not None
        found = {"sums": sums, "grads": arrays.half_grads}
        if arrays.weights.grad is not None:
            found["dw"] = arrays.weights.grad
        return found

    compare(bench, run, want_gradients=want_gradients)


def compare_fan_in(bench: Any, call: Call, source: int, incoming: bool) -> None:
    """``fan_in`` of a call on a state, added to a slice of an array or alone."""
    coef = bench.random(len(call.items), 3, bench.channels)
    shape = bench.larger if source < 2 else bench.smaller
    before = bench.random(*shape[:3], 4 * bench.channels)

    def run(backend: Any, arrays: Arrays, cast: Any) -> dict[str, Tensor]:
        x = arrays.states[source]
        out = torch.zeros_like(x)
        part = cast(before)[..., bench.channels : 2 * bench.channels] if incoming else None
        backend.fan_in(call, arrays, x, cast(coef), part, out)
        assert arrays.weights.grad is not None
        return {"dx": out, "dw": arrays.weights.grad}

    compare(bench, run)


@pytest.mark.parametrize("source", [0, 2], ids=["from-input", "from-node"])
@pytest.mark.parametrize("incoming", [True, False], ids=["incoming", "alone"])
def test_fan_in(bench: Any, source: int, incoming: bool) -> None:
    compare_fan_in(bench, bench.calls.gather[source], source, incoming)


@pytest.mark.parametrize("channels", CHANNELS, ids=lambda c: f"odd-c{c}")
def test_fan_in_of_factorized_reduces_behind_convolutions(
    channels: int, make_bench: Callable[..., Any]
) -> None:
    """As where pruning leaves no skip on a state's first edge."""
    bench = make_bench(channels, SIZES["odd"], reduction=True)
    call = bench.calls.gather[0]
    items = sorted(call.items, key=lambda item: item.kind == plan.FACTORIZED)
    assert items[0].kind != plan.FACTORIZED
    assert items[-1].kind == plan.FACTORIZED
    compare_fan_in(bench, Call(tuple(items), call.num_ops), 0, False)


@pytest.mark.parametrize("channels", CHANNELS, ids=lambda c: f"ties-c{c}")
def test_first_of_equal_maxima_takes_the_gradient(
    channels: int, reduction: bool, make_bench: Callable[..., Any]
) -> None:
    """In row-major order, as in torch: windows have few distinct numbers."""
    bench = make_bench(channels, SIZES["odd"], reduction)
    bench.states = [state.sign() for state in bench.states]
    bench.compute_outputs()
    compare_fan_in(bench, bench.calls.gather[0], 0, False)
