"""Where the time of a run goes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from pdarts_fast.run import clock as clocks
from pdarts_fast.run.clock import Clock
from pdarts_fast.run.report_data import RunData
from pdarts_fast.run.report_sections import epochs_note


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock on which a second passes between any two looks."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    return Clock()


def test_time_is_divided_and_only_overhead_is_returned(clock: Clock) -> None:
    assert clock.lap(clocks.SET_UP) == 0
    assert clock.lap(clocks.LOADING) == 1
    for _ in range(7):
        assert clock.lap(clocks.STEP) == 0
    assert clock.lap(clocks.VALIDATION) == 0
    assert clock.lap(clocks.CHECKPOINT) == 1
    assert clock.seconds[clocks.STEP] == 7
    # Two of ten seconds: set-up does not count.
    assert clock.overhead == pytest.approx(0.2)
    assert clock.summary() == (
        "time: set-up 0:01, steps 0:07, validation 0:01; outside the steps 20.0% "
        "(loading 1.0 s, logging 0.0 s, checkpoints 1.0 s, report 0.0 s)"
    )


def test_a_run_that_did_nothing_has_no_overhead() -> None:
    assert Clock().overhead == 0


def test_a_cpu_has_nothing_to_wait_for(clock: Clock) -> None:
    clock.wait(torch.device("cpu"))
    assert clock.seconds[clocks.STEP] == 0


@pytest.mark.parametrize(
    ("epochs", "note"),
    [
        ([{"seconds": 8.0, "overhead_seconds": 0.2}] * 2, "2 epochs, 2.5% of the time"),
        ([{"seconds": 8.0}, {"seconds": 4.0, "overhead_seconds": 1.0}], "2 epochs, 25.0%"),
        ([{"seconds": 8.0}], "1 epoch"),
        ([], "0 epochs"),
    ],
    ids=["measured", "partly-measured", "of-before", "none"],
)
def test_the_report_says_what_share_was_outside_the_steps(
    epochs: list[dict[str, float]], note: str
) -> None:
    text = epochs_note(RunData(Path("run"), {}, epochs=epochs))
    assert text.startswith(note)
    assert ("outside their steps" in text) == ("%" in note)
