"""When steps are recorded, with what they leave untouched, and what happens if it fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pdarts_fast.capture.cuda import check_cuda_graphs, cuda_capture
from pdarts_fast.capture.step import MOST_GRAPHS
from pdarts_fast.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., Any]


class Rerun:
    """Stands in for CUDA graphs: a replay calls the function again.

    Attributes:
        log: What was asked, in order.
    """

    warmups = 2

    def __init__(self, fail: str = "") -> None:
        self.broken = False
        self.fail = fail
        self.log: list[str] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        self.log.append("warm-up")
        for _ in range(self.warmups):
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.log.append("record")
        function()
        if self.fail:
            raise RuntimeError(self.fail)

        def replay() -> None:
            self.log.append("replay")
            function()

        return replay

    def release(self) -> None:
        self.log.append("release")


def values(step: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in step.state_tensors()]


def same(one: Any, other: Any) -> bool:
    one.prepare()
    other.prepare()
    pairs = zip(one.state_tensors(), other.state_tensors(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_each_kind_and_size_is_recorded_once(make_step: Make, make_batch: Make) -> None:
    eager, graphed, capture = make_step(), make_step(), Rerun()
    graphed.capture_with(capture)
    for step in (eager, graphed):
        step.set_epoch(0.1, 0.2)
        for number, (size, alphas) in enumerate([(4, False), (4, True), (2, True)] * 2):
            batch = make_batch(number, size)
            step.run(batch, make_batch(50 + number, size) if alphas else None, number)
    once = ["warm-up", "record", "replay"]
    assert capture.log == once * 3 + ["replay"] * 3
    assert same(graphed, eager)


def test_recording_leaves_generators_and_state_as_they_were(
    make_step: Make, make_batch: Make
) -> None:
    step, capture = make_step(), Rerun()
    step.capture_with(capture)
    step.prepare()
    before, random = values(step), torch.get_rng_state()
    weight = step.weights[0].detach().clone()

    def weight_pass(batch: Any) -> None:
        torch.rand(1)
        step._weight_pass(batch)

    graph = step._graphs._record(weight_pass, (make_batch(0),))
    assert capture.log == ["warm-up", "record"]
    assert all(torch.equal(a, b) for a, b in zip(step.state_tensors(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    graph.run((make_batch(0),))
    assert not torch.equal(step.weights[0], weight)


def test_a_resumed_step_has_its_momentum_after_recording(make_step: Make, make_batch: Make) -> None:
    first = make_step()
    first.run(make_batch(0), make_batch(1), 0)
    steps = []
    for capture in (None, Rerun()):
        step = make_step()
        step.load_state_dict(copy.deepcopy(first.state_dict()))
        step.capture_with(capture)
        step.run(make_batch(2), make_batch(3), 1)
        steps.append(step)
    assert same(*steps)
    assert {state["step"].item() for state in steps[1].alpha_optimizer.state.values()} == {2}


def test_a_step_that_cannot_be_captured_runs_eagerly_after_one_warning(
    make_step: Make, make_batch: Make, caplog: pytest.LogCaptureFixture
) -> None:
    eager, graphed = make_step(), make_step()
    capture = Rerun("operation not permitted when stream is capturing\nmore lines")
    with caplog.at_level(logging.WARNING):
        for step in (eager, graphed):
            step.capture_with(capture if step is graphed else None)
            for number in range(3):
                step.run(make_batch(number), make_batch(9), number)
        later = make_step()
        later.capture_with(capture)
        later.run(make_batch(0), None, 0)
    assert same(graphed, eager)
    assert capture.log.count("record") == 1
    (message,) = caplog.messages
    assert "operation not permitted when stream is capturing" in message
    assert "--no-cuda-graphs" in message
    assert "more lines" not in message
    assert all(p.grad is None for p in graphed.network.parameters())


def test_a_bug_in_a_step_is_no_capture_failure(make_step: Make, make_batch: Make) -> None:
    step = make_step()
    step.capture_with(Rerun())
    step.alpha_term = lambda alphas: alphas[0].sum() + "a bug"
    with pytest.raises(TypeError):
        step.run(make_batch(0), make_batch(1), 0)


def test_there_is_a_limit_to_the_number_of_graphs(make_step: Make, make_batch: Make) -> None:
    eager, graphed, capture = make_step(), make_step(), Rerun()
    graphed.capture_with(capture)
    for step in (eager, graphed):
        for size in range(2, MOST_GRAPHS + 4):
            step.run(make_batch(size, size), None, size)
    assert capture.log.count("record") == MOST_GRAPHS
    assert same(graphed, eager)


def test_graphs_are_released_between_stages_and_when_the_network_changes(
    make_step: Make, make_batch: Make
) -> None:
    step, capture = make_step(), Rerun()
    step.capture_with(capture)
    step.run(make_batch(0), None, 0)
    step.invalidate()
    step.run(make_batch(0), None, 1)
    step.close()
    step.run(make_batch(0), None, 2)
    once = ["warm-up", "record", "replay", "release"]
    assert capture.log == once * 2


def test_loading_a_state_records_anew(make_step: Make, make_batch: Make) -> None:
    eager, graphed, capture = make_step(), make_step(), Rerun()
    graphed.capture_with(capture)
    for step in (eager, graphed):
        step.run(make_batch(0), None, 0)
        saved = copy.deepcopy(step.state_dict())
        step.run(make_batch(1), None, 1)
        step.load_state_dict(saved)
        step.run(make_batch(1), None, 1)
    assert capture.log.count("record") == 2
    assert same(graphed, eager)


def test_only_gpus_have_graphs() -> None:
    assert cuda_capture(torch.device("cpu"), True) is None
    assert cuda_capture(torch.device("cuda"), False) is None


@pytest.mark.parametrize(
    ("variables", "collectives", "named"),
    [
        ({"CUDA_LAUNCH_BLOCKING": "1"}, None, "CUDA_LAUNCH_BLOCKING"),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, None, "PYTORCH_NO_CUDA_MEMORY_CACHING"),
        ({}, "gloo", "gloo"),
    ],
    ids=["blocking-launches", "no-cache", "gloo"],
)
def test_what_does_not_go_with_graphs_is_refused(
    variables: dict[str, str],
    collectives: str | None,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"--cuda-graphs: .*{named}.*--no-cuda-graphs"):
        check_cuda_graphs(torch.device("cuda"), True, collectives)
    check_cuda_graphs(torch.device("cuda"), False, collectives)
    check_cuda_graphs(torch.device("cpu"), True, collectives)


def test_graphs_go_with_nccl_and_a_plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    check_cuda_graphs(torch.device("cuda"), True, "nccl")
