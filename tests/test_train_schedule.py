"""Learning rate and drop-path against their formulas and their corner points."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from pdarts_fast.train_config import TrainConfig, preset
from pdarts_fast.train_schedule import drop_path, learning_rate


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]


def test_cosine_starts_at_lr_and_would_end_at_lr_min() -> None:
    config = dataclasses.replace(preset("cifar10"), lr_min=0.005)
    assert learning_rate(config, 0) == 0.025
    assert learning_rate(config, 300) == pytest.approx(0.015)
    assert learning_rate(config, 600) == pytest.approx(0.005)
    want = 0.005 + 0.02 * (1 + math.cos(math.pi * 599 / 600)) / 2
    assert learning_rate(config, 599) == pytest.approx(want)


def test_linear_falls_to_zero_the_last_five_epochs_at_a_fifth_of_the_slope() -> None:
    config = preset("imagenet-256")
    values = [*rates(config), learning_rate(config, config.epochs)]
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == 0.0
    assert falls[:-5] == pytest.approx([0.1 / 246] * 245)
    assert falls[-5:] == pytest.approx([0.1 / 246 / 5] * 5)


@pytest.mark.parametrize("epochs", [1, 3, 5, 6])
def test_linear_with_few_epochs_starts_at_lr_and_stays_positive(epochs: int) -> None:
    values = rates(dataclasses.replace(preset("imagenet-256"), epochs=epochs))
    assert values[0] == pytest.approx(0.1)
    assert all(value > 0 for value in values)
    assert values == sorted(values, reverse=True)


def test_large_batches_warm_up_over_five_epochs() -> None:
    config = preset("imagenet")
    cold = rates(dataclasses.replace(config, warmup_epochs=0))
    warm = rates(config)
    assert warm[:5] == pytest.approx([cold[e] * (e + 1) / 5 for e in range(5)])
    assert warm[5:] == cold[5:]


def test_batches_of_256_do_not_warm_up() -> None:
    config = preset("imagenet-256")
    assert config.warmup_epochs == 5
    assert learning_rate(config, 0) == pytest.approx(0.1)
    larger = dataclasses.replace(config, batch_size=257)
    assert learning_rate(larger, 0) == pytest.approx(0.1 / 5)


def test_drop_path_grows_linearly_from_zero() -> None:
    config = preset("cifar10")
    assert [drop_path(config, e) for e in (0, 300, 600)] == pytest.approx([0.0, 0.15, 0.3])
