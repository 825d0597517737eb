"""What a person sees: remaining time, figures, log lines."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from pdarts_fast.config import SearchConfig
from pdarts_fast.run.progress import (
    BarDisplay,
    LogDisplay,
    RemainingTime,
    Status,
    duration,
)

STATUS = Status(
    stage=2, stages=3, epoch=4, epochs=25, step=50, steps=261, loss=1.23456, accuracy=0.5678,
    images_per_second=1234.5, stage_eta=75.0, search_eta=3700.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.6, "0:10"), (75, "1:15"), (600, "10:00"), (3700, "1:01:40"),
     (36000, "10:00:00"), (90000, "1 day, 1:00:00")],
    ids=str,
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def remaining() -> RemainingTime:
    """Two stages of four epochs with ten steps; the second stage's passes cost 1.5 as much."""
    config = SearchConfig(
        cells=(4, 8), ops_kept=(8, 6), channels=(2, 2), skip_dropout=(0.0, 0.0), epochs=4,
        warmup_epochs=1,
    )  # fmt: skip
    return RemainingTime(config, 10)


def test_nothing_is_known_before_the_first_pass() -> None:
    assert remaining().left(0, 0, 0) == (0.0, 0.0)


def test_time_left_counts_passes_and_what_they_cost() -> None:
    time = remaining()
    time.add(0, 10, 20.0)  # the first epoch: 2 seconds a pass
    # Three epochs of 20 passes are left, then 70 passes at 3 seconds.
    assert time.left(0, 1, 0) == (pytest.approx(120.0), pytest.approx(330.0))
    # In an epoch that trains alphas a step is two passes.
    assert time.left(0, 1, 5) == (pytest.approx(100.0), pytest.approx(310.0))
    assert time.left(0, 0, 5) == (pytest.approx(130.0), pytest.approx(340.0))
    assert time.left(1, 3, 10) == (0.0, 0.0)


def test_speed_is_the_mean_over_all_passes() -> None:
    time = remaining()
    time.add(0, 10, 20.0)
    time.add(1, 20, 30.0)  # 1.5 seconds a pass, half of what the first stage foretold
    assert time.left(1, 3, 0)[0] == pytest.approx(20 * 1.5 * 50 / 40)


def test_log_lines_have_all_figures(caplog: pytest.LogCaptureFixture) -> None:
    display = LogDisplay()
    with caplog.at_level(logging.INFO):
        display.start_stage(1, "stage 1/3: 5 cells", 100, 0)
        display.advance()
        display.report(STATUS)
        display.message("done")
        display.close()
    assert caplog.messages == [
        "stage 1/3: 5 cells",
        "stage 2/3 epoch 4/25 step 50/261  loss 1.235  acc 56.8%  1234 img/s  "
        "stage 1:15  search 1:01:40 left",
        "done",
    ]


def test_a_bar_shows_all_figures_and_texts_as_they_are() -> None:
    stream = io.StringIO()
    display = BarDisplay(Console(file=stream, force_terminal=True, width=140, color_system=None))
    display.start_stage(2, "stage 2/3: [11] cells", 100, 25)
    for _ in range(25):
        display.advance()
    display.report(STATUS)
    display.message("writes into [bold]runs[/bold]")
    display.close()
    text = stream.getvalue()
    assert "stage 2/3: [11] cells" in text
    assert "writes into [bold]runs[/bold]" in text
    assert "stage 2/3 epoch 4/25" in text
    assert " 50% loss 1.235  acc 56.8%  1234 img/s  stage 1:15  search 1:01:40 left" in text
