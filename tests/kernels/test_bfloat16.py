"""Primitives on arrays of bfloat16: rounding, and the matrix unit of AMX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.cpu import library
from pdarts_fast.kernels.cpu.primitives import CompiledPrimitives
from pdarts_fast.kernels.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread", "kernels")

MakeBench = Callable[..., Any]


def test_bfloat16_is_rectified_as_torch_does(kernels: str, make_bench: MakeBench) -> None:
    bench = make_bench(16, (2, 6, 6), reduction=False)
    call, infinity = bench.calls.inputs[1], float("inf")
    tiny = torch.finfo(torch.bfloat16).tiny
    x = torch.randn(2, 6, 6, 64).bfloat16()
    x[0, 0, :, 47] = torch.tensor([infinity, -infinity, -0.0, tiny, -tiny, -3.0])
    # NaN with either sign.
    x[0, 1, :2, 47] = torch.tensor([0x7FC0, -0x40], dtype=torch.int16).view(torch.bfloat16)
    found = []
    for backend in (Reference(), fused.backend_named(kernels)):
        arrays = bench.arrays(torch.bfloat16)
        backend.fan_out(call, arrays, x, bench.sums_like(call, 2, 16))
        found.append(arrays.y[call.places(arrays.y.device).slots].float())
    want, got = found
    assert torch.isnan(want[:, 0, 1, :2]).all()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_bfloat16_is_stored_rounded_to_nearest_even(kernels: str, make_bench: MakeBench) -> None:
    bench = make_bench(16, (2, 6, 6), reduction=False)
    x = torch.randn(2, 6, 6, 16) * torch.logspace(-30, 30, 16)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    got = x.bfloat16()
    one = torch.ones(16)
    fused.backend_named(kernels).affine_(got, one, 0 * one)
    assert torch.equal(got[0, 0, 1:], x.bfloat16()[0, 0, 1:])
    assert torch.isnan(got[0, 0, 0, 0])
    arrays = bench.arrays(torch.bfloat16)
    call = bench.calls.leave[2]
    for backend in (Reference(), fused.backend_named(kernels)):
        sums = bench.sums_like(call, 2, 16)
        backend.fan_out(call, arrays, arrays.states[2], sums)
        stored = arrays.y[call.places(arrays.y.device).slots].double()
        torch.testing.assert_close(sums[:, 0], stored.mean((1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 32, 48, 80], ids=lambda c: f"c{c}")
def test_amx_agrees_with_the_products_that_it_replaces(
    channels: int, amx_library: Path, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of one to three tiles, whole and half ones, and rests of pixels."""
    monkeypatch.setenv(library.PATH_VARIABLE, str(amx_library))
    bench = make_bench(channels, (2, 5, 19), reduction=False)
    found = {}
    for variant in ("avx512bf16", "amx"):
        monkeypatch.setenv(library.VARIANT_VARIABLE, variant)
        loaded = library.load()
        emulated = getattr(loaded.handle, "pdarts_emulated", None)
        before = emulated and emulated()
        found[variant] = _every_product(bench, CompiledPrimitives(loaded))
        # A processor with AMX has the installed library, which emulates nothing.
        assert emulated is None or (emulated() > before) == (variant == "amx")
    for name, value in found["avx512bf16"].items():
        # What is stored may be rounded to either of two neighbours, and moments are of that.
        tolerance = {torch.bfloat16: 2.0**-7, torch.float64: 5e-4}.get(value.dtype, 2e-5)
        scale = value.abs().max().clamp_min(1e-3)
        off = (found["amx"][name].double() - value.double()).abs().max() / scale
        assert off <= tolerance, f"{name}: {off:.1e}"


DENSE_SIZES = [(2, 5, 16), (1, 1, 13), (3, 9, 31), (2, 6, 32), (2, 7, 47), (2, 17, 12), (1, 2, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("size", DENSE_SIZES, ids=lambda size: "x".join(map(str, size)))
def test_dense_convolutions_are_as_close_as_stencils(
    size: tuple[int, int, int],
    amx_library: Path,
    make_bench: MakeBench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 16 channels ``amx`` multiplies both halves of a convolution in one; see ``dense.h``.

    Either rounds other factors to bfloat16, so both are compared with float32 arithmetic.
    """
    monkeypatch.setenv(library.PATH_VARIABLE, str(amx_library))
    bench = make_bench(16, size, reduction=False)
    found = {}
    for variant in ("avx512", "avx512bf16", "amx"):
        monkeypatch.setenv(library.VARIANT_VARIABLE, variant)
        found[variant] = _every_product(bench, CompiledPrimitives(library.load()))
    for name, value in found["avx512"].items():
        exact = value.double()
        off = {v: ((found[v][name].double() - exact).norm() / exact.norm()).item() for v in found}
        assert off["avx512bf16"] < 0.01, name
        assert off["amx"] <= 1.5 * off["avx512bf16"], f"{name}: {off}"
    # An alpha step wants no gradients of weights.
    alone = _every_product(bench, CompiledPrimitives(library.load()), want_gradients=False)
    assert not any("dw" in name for name in alone)
    assert any("dw" in name for name in found["amx"])
    for name, value in alone.items():
        assert torch.equal(value, found["amx"][name]), name


def _every_product(
    bench: Any, backend: CompiledPrimitives, *, want_gradients: bool = True
) -> dict[str, Tensor]:
    """What the primitives with products compute from bfloat16 arrays."""
    channels, found = bench.channels, {}
    for name, call in {"state": bench.calls.leave[2], "input": bench.calls.inputs[1]}.items():
        arrays, sums = bench.arrays(torch.bfloat16), bench.sums_like(call, 2, channels)
        x = bench.states[2]
        if name == "input":
            x = bench.random(*bench.smaller[:3], 4 * channels)
            arrays.y = torch.zeros(1, *bench.smaller, dtype=torch.bfloat16)
        backend.fan_out(call, arrays, x.bfloat16(), sums)
        found |= {f"y of {name}": arrays.y, f"moments of {name}": sums}
    for name, call in {"node": bench.calls.gather[2], "input": bench.calls.inputs[1]}.items():
        arrays = bench.arrays(torch.bfloat16, want_gradients)
        x = bench.states[2]
        if name == "input":
            x = bench.random(*bench.smaller[:3], 4 * channels)
            arrays.y, arrays.grads = bench.y[:1].bfloat16(), [bench.grads[0].bfloat16()]
        out, coef = (
            torch.zeros_like(x, dtype=torch.bfloat16),
            bench.random(len(call.items), 3, channels),
        )
        backend.fan_in(call, arrays, x.bfloat16(), coef.float(), None, out)
        found[f"dx of {name}"] = out
        if arrays.weights.grad is not None:
            found[f"dw of {name}"] = arrays.weights.grad
    call = bench.calls.enter_second[3][1]
    arrays = bench.arrays(torch.bfloat16, want_gradients)
    scale, shift, coef = (
        bench.random(len(call.items), *s, channels).float() for s in ((), (), (3,))
    )
    backend.mid_backward(call, arrays, scale, shift, coef, bench.sums_like(call, 2, channels))
    assert arrays.half_grads is not None
    found["halves"] = arrays.half_grads
    if arrays.weights.grad is not None:
        found["dw of halves"] = arrays.weights.grad
    return found
