"""What a person sees of a sweep: a line a run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from pdarts_fast.run.progress import duration
from pdarts_fast.sweep.directory import Outcome
from pdarts_fast.sweep.plan import PlannedRun

log = logging.getLogger(__name__)


class Display(Protocol):
    """Shows the course of a sweep."""

    def started(self, run: PlannedRun, where: str) -> None:
        """A run begins or goes on."""

    def progress(self, run: PlannedRun, text: str) -> None:
        """What a run has printed last."""

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """A run has ended."""

    def message(self, text: str) -> None:
        """Something worth a line happened."""

    def close(self) -> None:
        """The sweep has ended."""


class _Counted:
    """Counts the runs that have ended and writes the lines of beginnings and ends.

    Args:
        total: Runs of the sweep.
        done: Those that ended before.
        logs: Folder of the logs.
    """

    def __init__(self, total: int, done: int, logs: Path) -> None:
        self._total = total
        self._done = done
        self._logs = logs
        self._begun: dict[str, float] = {}

    def _start_line(self, run: PlannedRun, where: str) -> str:
        self._begun[run.name] = time.monotonic()
        return f"{run.name}: started{f' on {where}' if where else ''}"

    def _end_line(self, run: PlannedRun, outcome: Outcome) -> str:
        seconds = time.monotonic() - self._begun.get(run.name, time.monotonic())
        if outcome.status == "stopped":
            return f"{run.name}: stopped; it goes on with --resume"
        self._done += 1
        place = f"{run.name}: {outcome.status} after {duration(seconds)}"
        if outcome.status == "failed":
            place += f" ({outcome.error}); log: {self._logs / (run.name + '.log')}"
        return f"{place} [{self._done}/{self._total}]"


class LogDisplay(_Counted):
    """Plain log lines, for files and pipes."""

    def started(self, run: PlannedRun, where: str) -> None:
        log.info(self._start_line(run, where))

    def progress(self, run: PlannedRun, text: str) -> None:
        """Nothing: the run's log has it."""

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        log.info(self._end_line(run, outcome))

    def message(self, text: str) -> None:
        log.info(text)

    def close(self) -> None:
        """Nothing to put back."""


class TerminalDisplay(_Counted):
    """A line for each active run: its name, its time and what it printed last."""

    def __init__(self, total: int, done: int, logs: Path, console: Console) -> None:
        super().__init__(total, done, logs)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def started(self, run: PlannedRun, where: str) -> None:
        self._print(self._start_line(run, where))
        self._tasks[run.name] = self._progress.add_task(escape(run.name), total=None, text="starts")

    def progress(self, run: PlannedRun, text: str) -> None:
        if run.name in self._tasks and text:
            self._progress.update(self._tasks[run.name], text=escape(text))

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        if run.name in self._tasks:
            self._progress.remove_task(self._tasks.pop(run.name))
        self._print(self._end_line(run, outcome))

    def message(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._progress.stop()

    def _print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def make_display(total: int, done: int, logs: Path) -> Display:
    """A display for standard error; arguments as in the displays."""
    console = Console(stderr=True)
    if console.is_terminal:
        return TerminalDisplay(total, done, logs, console)
    return LogDisplay(total, done, logs)
