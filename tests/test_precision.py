"""What mixed precision is on which device, and the loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdarts_fast.precision import FULL, LossScale, Precision, precision_on

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((6, 0), Precision(torch.float16, True)),
        ((7, 5), Precision(torch.float16, True)),
        ((8, 0), Precision(torch.bfloat16, False)),
        ((9, 0), Precision(torch.bfloat16, False)),
    ],
    ids=["pascal", "turing", "ampere", "hopper"],
)
def test_old_gpus_have_float16_with_a_scale(
    capability: tuple[int, int], wanted: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision_on(torch.device("cuda"), True) == wanted
    assert precision_on(torch.device("cuda"), False) == FULL


def test_a_cpu_has_bfloat16() -> None:
    assert precision_on(CPU, True) == Precision(torch.bfloat16, False)
    x = torch.ones(2, 2)
    with precision_on(CPU, True).autocast(CPU):
        assert (x @ x).dtype == torch.bfloat16
    with FULL.autocast(CPU):
        assert (x @ x).dtype == torch.float32


def graded(value: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.full((3,), value)
    return parameters


def test_gradients_are_divided_by_the_scale() -> None:
    scale = LossScale(CPU)
    parameters = graded(65536.0)
    assert scale.unscale(parameters) is scale.found_inf
    assert parameters[0].grad.tolist() == [1.0] * 3
    assert scale.found_inf.item() == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_an_overflow_is_found_and_halves_the_scale(value: float) -> None:
    scale = LossScale(CPU)
    scale.growth.fill_(5)
    scale.unscale(graded(value))
    assert scale.found_inf.item() == 1
    scale.update()
    assert (scale.scale.item(), scale.growth.item()) == (32768.0, 0)
    assert not scale.hopeless()
    scale.unscale(graded(1.0))
    assert scale.found_inf.item() == 0


def test_the_scale_doubles_after_enough_good_steps() -> None:
    scale = LossScale(CPU)
    for _ in range(LossScale.interval):
        scale.unscale(graded(1.0))
        scale.update()
    assert scale.scale.item() == 2 * LossScale.INITIAL


def test_gradients_that_overflow_without_a_scale_are_hopeless() -> None:
    scale = LossScale(CPU)
    for _ in range(17):
        assert not scale.hopeless()
        scale.unscale(graded(float("inf")))
        scale.update()
    assert scale.hopeless()


def test_the_scale_goes_on_from_a_checkpoint() -> None:
    one, other = LossScale(CPU), LossScale(CPU)
    one.unscale(graded(float("inf")))
    one.update()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.scale, one.scale)
