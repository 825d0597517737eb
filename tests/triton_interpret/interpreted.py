"""Tests that need the interpreter: run by test_shared_suite.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pdarts_fast.kernels import philox
from pdarts_fast.kernels.triton import common, load, self_check
from pdarts_fast.kernels.triton.fold import fold
from pdarts_fast.kernels.triton.mix import mix
from pdarts_fast.kernels.triton.primitives import TritonPrimitives

CPU = torch.device("cpu")


def test_the_kernels_are_interpreted() -> None:
    assert common.INTERPRETED


def test_the_self_check_passes() -> None:
    load.register()
    findings = self_check.check(CPU)
    names = {one.primitive.split(" of a reduction")[0] for one in findings}
    assert names == {*self_check.CHECKS, "whole pass"}
    assert [one for one in findings if not one.is_good] == []


def test_the_self_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TritonPrimitives):
        def mix(self, call, arrays, scale, shift, out: Tensor) -> None:
            super().mix(call, arrays, scale, shift, out)
            out[0, 0, 0, 3] += 0.5

        def reduce(self, *arguments: object) -> None:
            raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(self_check, "TOLERANCE", {torch.float32: 5e-5})
    wanted = {name: self_check.CHECKS[name] for name in ("mix", "reduce")}
    monkeypatch.setattr(self_check, "CHECKS", wanted)
    bad = [one for one in self_check.check(CPU, Wrong()) if not one.is_good]
    assert {one.primitive for one in bad} == {"mix", "reduce", "mix of a reduction cell"}
    assert {one.failure for one in bad} == {"", "RuntimeError: no such instruction"}


@pytest.mark.parametrize("channels", [16, 12, 6], ids=["c16", "c12-padded", "c6-no-quads"])
@pytest.mark.parametrize("state", [(3, 4), (-7, 2**33 + 5)], ids=["small", "large"])
def test_dropout_masks_are_those_of_every_backend(channels: int, state: tuple[int, int]) -> None:
    sample = self_check.Sample(False, torch.float32)
    arrays = sample.arrays(CPU, torch.float32)
    arrays.state, arrays.channels = torch.tensor(state), channels
    call = sample.calls.skips[2]
    item = call.items[1]
    x = torch.ones(2, 3, 5, 16)
    arrays.states = [x] * 6
    arrays.y = x[None]
    scale = torch.zeros(len(call.items), 16)
    scale[1] = 1
    out = torch.empty_like(x)
    mix(call, arrays, scale, torch.zeros(16), out)
    shape = torch.Size((2, channels, 3, 5))
    want = philox.keep_mask(arrays.rate, arrays.state, item.stream, shape).permute(0, 2, 3, 1)
    torch.testing.assert_close(out[..., :channels], want / 0.75, rtol=1e-6, atol=0)


def test_moments_of_tiles_merge_without_losing_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 100, 48, generator=generator).double() + 1000
    counts = [100, 100, 3, 1, 0, 100, 57]
    tiles = torch.zeros(1, 7, 3, 48)
    kept = []
    for i, count in enumerate(counts):
        rows = x[i, :count]
        kept.append(rows)
        if count:
            mean = rows.mean(0).float()
            tiles[0, i] = torch.stack(
                [torch.full((48,), float(count)), mean, ((rows - rows.mean(0)) ** 2).sum(0).float()]
            )
    sums = torch.empty(1, 2, 48, dtype=torch.float64)
    fold(tiles, sums)
    everything = torch.cat(kept)
    torch.testing.assert_close(sums[0, 0], everything.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(sums[0, 1], everything.var(0, unbiased=False), rtol=1e-3, atol=0)


def test_tiles_of_a_gpu_give_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = self_check.Sample(False, torch.float32)
    call = sample.calls.leave[4]
    found = []
    for scale in (common.TILE_SCALE, 1):
        monkeypatch.setattr(common, "TILE_SCALE", scale)
        arrays = sample.arrays(CPU, torch.float32)
        sums = torch.zeros(len(call.items), 2, 16, dtype=torch.float64)
        TritonPrimitives().fan_out(call, arrays, arrays.states[4], sums)
        found.append((arrays.y[call.places(arrays.y.device).slots], sums))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)
