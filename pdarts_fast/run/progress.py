"""What a person sees while a search runs: a progress bar, or plain log lines."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pdarts_fast.config import SearchConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """The figures of one report.

    Attributes:
        stage: 1-based stage, of `stages` (1 for work without stages).
        epoch: 1-based epoch in the stage, of `epochs`.
        step: Steps done in the epoch, of `steps`.
        loss: Mean training loss since the last report.
        accuracy: Training accuracy since the last report, 0 to 1.
        images_per_second: Images (of both halves in a search) trained on per second.
        stage_eta: Seconds left in the stage.
        search_eta: Seconds left in the search or training.
    """

    stage: int
    stages: int
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float
    stage_eta: float
    search_eta: float


class Display(Protocol):
    """Shows the course of a search."""

    def start_stage(self, stage: int, text: str, steps: int, done: int) -> None:
        """A stage of `steps` steps begins, `done` of them made by an earlier process."""

    def advance(self) -> None:
        """One more step is done."""

    def report(self, status: Status) -> None:
        """New figures are there."""

    def message(self, text: str) -> None:
        """Something worth a line happened."""

    def close(self) -> None:
        """The search has ended."""


class LogDisplay:
    """Plain log lines, for files and pipes."""

    def start_stage(self, stage: int, text: str, steps: int, done: int) -> None:
        log.info(text)

    def advance(self) -> None:
        """Nothing: lines come with figures."""

    def report(self, status: Status) -> None:
        log.info("%s step %d/%d  %s", _place(status), status.step, status.steps, _figures(status))

    def message(self, text: str) -> None:
        log.info(text)

    def close(self) -> None:
        """Nothing to put back."""


class NoDisplay:
    """Shows nothing: another process of the run does."""

    def start_stage(self, stage: int, text: str, steps: int, done: int) -> None:
        """Nothing to show."""

    def advance(self) -> None:
        """Nothing to show."""

    def report(self, status: Status) -> None:
        """Nothing to show."""

    def message(self, text: str) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to put back."""


class BarDisplay:
    """A bar a stage on a terminal, with loss, accuracy, images/s and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._progress.start()

    def start_stage(self, stage: int, text: str, steps: int, done: int) -> None:
        self._progress.console.print(text, highlight=False, markup=False)
        if self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(
            text.partition(":")[0], total=steps, completed=done, figures=""
        )

    def advance(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def report(self, status: Status) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=_place(status), figures=_figures(status))

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def _place(status: Status) -> str:
    stage = f"stage {status.stage}/{status.stages} " if status.stages > 1 else ""
    return f"{stage}epoch {status.epoch}/{status.epochs}"


def _figures(status: Status) -> str:
    left = duration(status.search_eta)
    if status.stages > 1:
        left = f"stage {duration(status.stage_eta)}  search {left}"
    return (
        f"loss {status.loss:.3f}  acc {100 * status.accuracy:.1f}%  "
        f"{status.images_per_second:.0f} img/s  {left} left"
    )


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text


class RemainingTime:
    """Estimates the time left from the speed of the passes made so far.

    A pass of a later stage is taken to cost in proportion to its cells, live ops and channels; an
    epoch that trains alphas has two passes a step.
    """

    def __init__(self, config: SearchConfig, steps: int) -> None:
        self._config = config
        self._steps = steps
        self._work = 0.0
        self._seconds = 0.0

    def pass_cost(self, stage: int) -> float:
        """Relative cost of one forward and backward pass in a stage (0-based)."""
        c = self._config
        return c.cells[stage] * c.ops_kept[stage] * c.channels[stage]

    def add(self, stage: int, passes: int, seconds: float) -> None:
        """Record the time that some passes took."""
        self._work += passes * self.pass_cost(stage)
        self._seconds += seconds

    def left(self, stage: int, epoch: int, step: int) -> tuple[float, float]:
        """Seconds left in the stage and in the search after `step` steps of an epoch."""
        c = self._config
        rate = self._seconds / self._work if self._work else 0.0
        per_epoch = [self._steps * (1 + (e >= c.warmup_epochs)) for e in range(c.epochs)]
        passes = sum(per_epoch[epoch:]) - step * (1 + (epoch >= c.warmup_epochs))
        in_stage = passes * self.pass_cost(stage) * rate
        later = sum(sum(per_epoch) * self.pass_cost(s) * rate for s in range(stage + 1, c.stages))
        return in_stage, in_stage + later
