"""The bench command at a size that takes seconds."""

from __future__ import annotations

import gc
import json
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from pdarts_fast.bench import gpu_cell, measure, rivals, run
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.cpu.memory import pool

needs_cpu = pytest.mark.skipif(
    not backends.available()["cpu"].usable, reason="needs the compiled kernels"
)


@needs_cpu
def test_reports_every_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    options = run.BenchOptions(stages=(1,), batch=2, repeats=1, accuracy=False, json=output)
    run.run_bench(options)
    (stage,) = json.loads(output.read_text())["stages"]
    assert set(stage["passes"]) == {rivals.PUBLISHED, rivals.PUBLISHED_LAST, "cpu", "cpu amp"}
    assert all(timing["median"] > 0 for timing in stage["passes"].values())
    assert stage["saved_bytes"]["cpu amp"] < stage["saved_bytes"]["cpu"]
    assert stage["saved_bytes"]["cpu"] < stage["saved_bytes"][rivals.PUBLISHED] / 4
    assert "published bilevel step" in stage["steps"]
    assert "projected" not in capsys.readouterr().out


@needs_cpu
def test_leaves_the_published_graph_out_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "available_memory", lambda: 10**8)
    options = run.BenchOptions(stages=(1,), batch=2, repeats=1, accuracy=False)
    report = run.run_bench(options)
    assert set(report["stages"][0]["passes"]) == {"cpu", "cpu amp"}
    assert "stage 1 at batch 2: the published graph is left out" in caplog.text
    assert "–" in capsys.readouterr().out


def test_amp_steps_compute_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = rivals.SearchStep

    def watched(network, config, device):  # type: ignore[no-untyped-def]
        seen.append(config.amp)
        return real(network, config, device)

    monkeypatch.setattr(rivals, "SearchStep", watched)
    made = rivals.make(1, 2, backends.REFERENCE, published=False)
    for rival in made.values():
        rivals.own_steps(rival, run.SearchConfig())
    assert seen == [False, True]


def test_a_turn_lasts_as_long_as_asked_and_counts_the_mean_of_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls = [0.0], {"short": 0, "long": 0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    last = ""

    def call(name: str, seconds: float) -> None:
        nonlocal last
        calls[name] += 1
        # After another's call one finds cold caches.
        clock[0] += seconds if name == last else seconds + 5.0
        last = name

    rivals = {"short": lambda: call("short", 2.0), "long": lambda: call("long", 40.0)}
    timings = measure.interleaved(rivals, repeats=2, turn=10.0)
    assert calls == {"short": 1 + 2 * 3, "long": 1 + 2 * 1}
    assert timings["short"].median == 2.0
    assert timings["long"].median == 45.0


def test_measuring_what_is_saved_keeps_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    outputs: list[weakref.ref[torch.Tensor]] = []
    x = torch.ones(2, 4)

    def forward() -> torch.Tensor:
        out = network(x)
        outputs.append(weakref.ref(out))
        return out

    # The input of the linear layer and the output of the ReLU.
    assert measure.saved_bytes(network, forward) == (2 * 4 + 2 * 3) * 4
    gc.collect()
    assert outputs[0]() is None


@needs_cpu
def test_a_cell_is_measured_on_any_device() -> None:
    pytest.importorskip("triton", reason="bytes of a pass are those of the Triton kernels")
    bench = gpu_cell.CellBench.make(16, 8, 2, "cpu", torch.device("cpu"))
    with torch.no_grad():
        want = bench.cell.forward_op_by_op(bench.s0.float(), bench.s1.float(), bench.weights)
    assert (bench.fused().float() - want).norm() < 0.03 * want.norm()
    found = gpu_cell.measure_cell(bench, 1, compiled=False)
    rivals = {gpu_cell.FUSED, gpu_cell.PUBLISHED, gpu_cell.AUTOCAST}
    assert {name for name in found if name.startswith("ms, ")} == {f"ms, {n}" for n in rivals}
    assert found["times faster than published"] == pytest.approx(
        found["ms, published"] / found["ms, fused"]
    )
    moved = found["GB/s"] * found["ms, fused"] * 1e6
    assert moved == pytest.approx(bench.bytes())
    # Inputs alone, read by the forward and the backward pass.
    assert moved > 4 * bench.s1.numel() * 2


def test_stages_have_the_skip_dropout_of_the_method() -> None:
    """The published graph has torch's dropout wherever ours has its own."""
    made = rivals.make(2, 2, backends.REFERENCE)
    fused, published = made[backends.REFERENCE].network, made[rivals.PUBLISHED].network
    own = {n for n, m in fused.named_modules() if type(m).__name__ == "SkipDropout"}
    theirs = {n: m.p for n, m in published.named_modules() if isinstance(m, nn.Dropout)}
    assert set(theirs) == own != set()
    assert fused.skip_dropout.p.item() == pytest.approx(0.4)
    assert set(theirs.values()) == {0.4}
    assert not rivals.make(1, 2, backends.REFERENCE)[backends.REFERENCE].network.has_skip_dropout


@pytest.mark.parametrize("predict", [None, "h100"])
def test_numbers_have_a_place_before_they_are_measured(tmp_path: Path, predict: str | None) -> None:
    output = tmp_path / "missing" / "bench.json"
    with pytest.raises(UsageError, match=r"--json .*there is no folder .*missing"):
        run.run_bench(run.BenchOptions(json=output, predict=predict))


def test_the_kernels_memory_is_handed_back() -> None:
    tensor = pool.empty((1 << 20,), torch.float32)
    del tensor
    assert pool.free > 0
    measure.release_memory()
    assert pool.free == 0


@pytest.mark.parametrize(("images", "used"), [(64, 32), (32, 32), (16, 8), (4, None)])
def test_float64_is_compared_at_the_largest_batch_that_fits(
    images: int, used: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def shortage(stage: int, batch: int, factor: float) -> tuple[float, float] | None:
        return None if batch <= images else (batch, images)

    monkeypatch.setattr(run, "_shortage", shortage)
    monkeypatch.setattr(run.accuracy, "errors", lambda stage, batch, backend: {"cpu": batch})
    want = None if used is None else {"batch": used, "rivals": {"cpu": used}}
    assert run._errors(1, 96, "cpu") == want
    assert ("stage 1: too little memory to compare" in caplog.text) == (used is None)
