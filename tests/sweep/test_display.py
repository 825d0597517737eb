"""What a sweep shows: a line a run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from pdarts_fast.sweep.directory import Outcome, last_line
from pdarts_fast.sweep.display import LogDisplay, TerminalDisplay
from pdarts_fast.sweep.plan import make_plan

RUNS = make_plan(2, ["lr=0.1,0.2"], ["--preset", "demo"]).runs


def test_terminal_has_a_line_for_each_active_run() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=20)
    display = TerminalDisplay(4, 1, Path("logs"), console)
    display.started(RUNS[0], "GPU 1")
    display.started(RUNS[1], "")
    display.progress(RUNS[0], "stage 1/3 [epoch 2/4]  loss 0.5")
    display.progress(RUNS[1], "stage 2/3 epoch 1/4")
    display._progress.refresh()
    shown = screen.getvalue()
    assert "lr=0.1-seed0: started on GPU 1" in shown
    assert "stage 1/3 [epoch 2/4]  loss 0.5" in shown, "square brackets are text, not markup"
    assert "stage 2/3 epoch 1/4" in shown
    display.ended(RUNS[0], Outcome("finished", 0))
    assert "lr=0.1-seed0: finished after 0:00 [2/4]" in screen.getvalue()
    screen.truncate(0)
    display._progress.refresh()
    assert "stage 1/3" not in screen.getvalue()
    assert "stage 2/3" in screen.getvalue()
    display.close()


def test_plain_lines_say_how_runs_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    display = LogDisplay(2, 0, Path("logs"))
    for run, outcome in (
        (RUNS[0], Outcome("failed", 1, "status 1: no disk")),
        (RUNS[1], Outcome("stopped", 143)),
        (RUNS[2], Outcome("finished", 0)),
    ):
        display.started(run, "")
        display.progress(run, "not shown")
        display.ended(run, outcome)
    assert [text for text in caplog.messages if "started" not in text] == [
        "lr=0.1-seed0: failed after 0:00 (status 1: no disk); log: logs/lr=0.1-seed0.log [1/2]",
        "lr=0.1-seed1: stopped; it goes on with --resume",
        "lr=0.2-seed0: finished after 0:00 [2/2]",
    ]


def test_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert last_line(log) == ""
    log.write_bytes(b"first\n" + b"x" * 9000 + b"\nloss \xff 0.5  \n\n")
    assert last_line(log) == "loss � 0.5"
    log.write_text("\n\n")
    assert last_line(log) == ""
