"""The predicted time: its arithmetic by hand, and its launches against the call tables."""

from __future__ import annotations

import pytest
import torch

from pdarts_fast.bench import predict_model as model
from pdarts_fast.bench.predict_model import Gpu, Work
from pdarts_fast.errors import UsageError

GPU = Gpu("test card", multiprocessors=10, clock=1e9, bandwidth=1e12, tensor=1e14)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work("bytes", 720_000_000, 1.0, 0.0, 100), 1e-3),
        (Work("slots", 1, 26e6, 0.0, 100), 1e-3),
        (Work("few programs", 1, 26e6, 0.0, 5), 2e-3),
        (Work("products", 1, 1.0, 5e10, 100), 1e-3),
    ],
    ids=lambda value: value.name if isinstance(value, Work) else None,
)
def test_a_launch_takes_what_binds_it(work: Work, seconds: float) -> None:
    assert model.body_seconds(work, GPU) == pytest.approx(seconds)
    overhead = model.REPLAY_SECONDS + model.RAMP_SECONDS
    assert model.launch_seconds(work, GPU) == pytest.approx(seconds + overhead)


def test_roofline_ratio_is_one_when_memory_binds_and_more_when_instructions_do() -> None:
    assert model.roofline_ratio(Work("m", 10**9, 1.0, 0.0, 100), GPU) == 1.0
    bound_by_issue = Work("i", 720_000_000, 3 * 26e6, 0.0, 100)
    assert model.roofline_ratio(bound_by_issue, GPU) == pytest.approx(3.0)


def test_a_search_counts_31320_passes() -> None:
    passes = dict.fromkeys((1, 2, 3), (1.0, 1.0))
    assert model.search_seconds(passes, 261, 10, 15) == 31_320
    assert model.search_seconds({1: (2.0, 0.0)}, 261, 10, 15) == 2 * 261 * 25
    assert model.search_seconds({1: (0.0, 1.0)}, 261, 10, 15) == 261 * 15


def test_small_operators_of_eager_torch_are_bound_by_their_launch() -> None:
    assert model.eager_seconds(1000, GPU) == model.EAGER_SECONDS
    large = model.eager_seconds(720_000_000, GPU)
    assert large == pytest.approx(1e-3 + model.RAMP_SECONDS)


def test_h100_is_the_one_of_the_assumptions() -> None:
    h100 = model.GPUS["h100"]
    assert h100.bandwidth * model.MEMORY_SHARE == pytest.approx(2.4e12, rel=0.01)


def test_an_unknown_gpu_is_refused_by_name() -> None:
    from pdarts_fast.bench.predict import run_predict

    with pytest.raises(UsageError, match="--predict v100: choose one of a100, h100"):
        run_predict("v100")


@pytest.fixture(scope="module")
def small_cell() -> str:
    from pdarts_fast.kernels import plan

    return plan.make_key(
        [[False, True, False, True, True, False, True, False]] * 14,
        channels=16,
        in_channels=(32, 64),
        reduction=False,
        reduction_prev=False,
        steps=4,
        multiplier=4,
        index=1,
        dropout=True,
    )


@pytest.mark.parametrize("want_weights", [True, False], ids=["weight_step", "alpha_step"])
def test_launches_follow_the_call_tables(small_cell: str, want_weights: bool) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from pdarts_fast.kernels import calls
    from pdarts_fast.kernels.triton.record import record_cell

    recorded = record_cell(small_cell, 2, (8, 8), torch.bfloat16, want_weights, True)
    names = [launch.name for launch in recorded.backward]
    table = calls.of(small_cell)
    # What leaves both inputs runs together.
    nodes, gathers = len(table.both), len(table.gather) - 1
    assert all(call.items for call in table.enter_second[3])
    assert names.count("reduce") == nodes
    # Those of a node are computed where they are first used.
    assert names.count("coefficients") == nodes + 1
    assert names.count("transposed") == nodes + gathers
    assert names.count("output_gradient") == nodes + gathers
    assert names.count("fan_in") == gathers
    assert names.count("pointwise_backward") == 1
    assert names.count("weight_products") == want_weights
    assert names.count("weight_gradients") == want_weights
    forward = [launch.name for launch in recorded.forward]
    assert forward.count("fan_out") == 2 * gathers
    assert forward.count("fold") == 1 + 2 * gathers
    assert forward.count("running") == forward.count("one_by_one") == 1
    assert forward[0] == "one_by_one"
    assert "pack_weights" not in [*names, *forward]


@pytest.mark.parametrize("want_weights", [True, False], ids=["weight_step", "alpha_step"])
def test_hardly_an_operator_of_torch_is_left(small_cell: str, want_weights: bool) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from pdarts_fast.kernels.triton.record import record_cell

    recorded = record_cell(small_cell, 2, (8, 8), torch.bfloat16, want_weights, True)
    assert sorted(recorded.forward_operators) == ["cat", "clone", "copy_"]
    assert list(recorded.backward_operators) == ["new_zeros"] * (1 + want_weights)


def test_innermost_loops_are_read_from_a_listing() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from pdarts_fast.kernels.triton.machine_code import innermost_loops

    listing = """
.L_x_0:
        /*0010*/                   MOV R1, R2 ;
.L_x_1:
        /*0020*/                   FFMA R1, R2, R3, R1 ;
        /*0030*/                   LDG.E.128 R4, [R2] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""
    assert innermost_loops(listing) == [(3, 1)]


def test_the_density_of_a_stencil_is_that_of_its_loops_of_multiply_adds() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from pdarts_fast.bench.predict_work import stencil_density

    assert stencil_density([(240, 0), (230, 96), (350, 160)]) == 580 / 256


def test_bytes_of_a_reduce_are_its_arrays_once(small_cell: str) -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from pdarts_fast.bench.predict_work import multiply_adds, work
    from pdarts_fast.kernels.triton.record import record_cell

    recorded = record_cell(small_cell, 2, (8, 8), torch.bfloat16, True, True)
    reduce = next(launch for launch in recorded.backward if launch.name == "reduce")
    partials = reduce.values["partials_ptr"]
    assert reduce.call is not None
    arrays = 1 + len(reduce.call.items)
    assert work(reduce).bytes == arrays * 2 * 8 * 8 * 16 * 2 + partials.numel() * 4
    first = next(launch for launch in recorded.forward if launch.name == "fan_out")
    assert first.call is not None
    taps = sum((item.kernel or 3) ** 2 for item in first.call.items)
    assert multiply_adds(first) == 2 * 8 * 8 * 16 * taps
