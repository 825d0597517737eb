"""What the documentation says of launches and predicted time, for every cell of a search."""

from __future__ import annotations

import pytest
import torch

from pdarts_fast.bench import predict_model as model
from pdarts_fast.bench.predict import BOTH_EPOCHS, STEPS, WEIGHT_EPOCHS, by_kernel, pass_seconds
from pdarts_fast.bench.predict import stage_work as launches_of
from pdarts_fast.kernels.triton.record import record_cell, search_cells

STAGES = (1, 2, 3)
H100 = model.GPUS["h100"]


@pytest.mark.parametrize("number", range(7))
def test_a_cell_takes_at_most_60_launches(number: int) -> None:
    key, size = search_cells()[number]
    recorded = record_cell(key, 96, size, torch.bfloat16, True, True)
    assert len(recorded.forward) + len(recorded.backward) <= 60
    assert len(recorded.forward_operators) + len(recorded.backward_operators) <= 5


def test_there_are_seven_kinds_of_cells() -> None:
    assert len(search_cells()) == 7


@pytest.mark.parametrize("stage", STAGES)
def test_every_kernel_is_within_twice_its_roofline_on_an_h100(stage: int) -> None:
    works, _ = launches_of(stage, True)
    ratios = {name: row["ratio"] for name, row in by_kernel(works, H100).items()}
    assert {name: ratio for name, ratio in ratios.items() if ratio > 2} == {}


def test_a_search_is_predicted_to_take_under_five_minutes_on_an_h100() -> None:
    passes = {}
    for stage in STAGES:
        weight, alpha = (pass_seconds(*launches_of(stage, w), H100) for w in (True, False))
        passes[stage] = (weight, alpha)
    seconds = model.search_seconds(passes, STEPS, WEIGHT_EPOCHS, BOTH_EPOCHS)
    assert seconds < 300
