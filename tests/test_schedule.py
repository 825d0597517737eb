"""Learning rate and skip dropout over the epochs of a stage."""

from __future__ import annotations

import dataclasses
import math

import pytest

from pdarts_fast.config import SearchConfig, preset
from pdarts_fast.schedule import learning_rate, skip_dropout

PAPER = preset("cifar10")


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0.025), (5, 0.0226127), (12, 0.0132848), (24, 9.8567e-05)],
    ids=lambda value: f"epoch{value}" if isinstance(value, int) else "",
)
def test_cosine_of_the_paper(epoch: int, rate: float) -> None:
    assert learning_rate(PAPER, epoch) == pytest.approx(rate, rel=1e-4)


def test_the_reference_schedule_is_one_epoch_ahead_and_ends_at_zero() -> None:
    reference = dataclasses.replace(PAPER, lr_schedule="reference")
    for epoch in range(24):
        assert learning_rate(reference, epoch) == learning_rate(PAPER, epoch + 1)
    assert learning_rate(reference, 24) == pytest.approx(0.0, abs=1e-18)


def test_cosine_ends_at_the_smallest_rate() -> None:
    config = SearchConfig(lr=0.1, lr_min=0.02, epochs=10, lr_schedule="reference")
    assert learning_rate(config, 9) == pytest.approx(0.02)
    assert learning_rate(SearchConfig(lr=0.1, lr_min=0.02, epochs=10), 0) == pytest.approx(0.1)


def test_skip_dropout_falls_jumps_back_and_decays() -> None:
    # Stage 3 of the paper's CIFAR-10 search: p = 0.7, 25 epochs, alphas from epoch 10 on.
    values = [skip_dropout(PAPER, 2, epoch) for epoch in range(25)]
    assert values[0] == pytest.approx(0.7 * 24 / 25)
    assert values[9] == pytest.approx(0.7 * 15 / 25)
    assert values[10] == 0.7
    assert values[11] == pytest.approx(0.7 * math.exp(-0.2))
    assert values[24] == pytest.approx(0.7 * math.exp(-0.2 * 14))
    assert max(values) == values[10]


def test_skip_dropout_is_that_of_the_stage() -> None:
    assert [skip_dropout(PAPER, stage, 10) for stage in range(3)] == [0.0, 0.4, 0.7]
    assert all(skip_dropout(PAPER, 0, epoch) == 0 for epoch in range(25))


def test_skip_dropout_rate_of_decay_is_a_setting() -> None:
    config = SearchConfig(skip_dropout=(0.5,), skip_dropout_decay=0.0, epochs=4, warmup_epochs=1)
    assert [skip_dropout(config, 0, epoch) for epoch in range(4)] == [0.375, 0.5, 0.5, 0.5]
