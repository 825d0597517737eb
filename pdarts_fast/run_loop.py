"""What a search and a training do alike around every step: time it, log, save and stop."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch

from pdarts_fast.descent import Descent
from pdarts_fast.distributed import Ranks
from pdarts_fast.errors import RunError
from pdarts_fast.meter import Averages, Meter
from pdarts_fast.run.clock import CHECKPOINT, LOADING, LOGGING, SET_UP, STEP, Clock
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.metrics import MetricsLog
from pdarts_fast.run.progress import Display, Status
from pdarts_fast.run.signals import Interrupted, StopRequest


class Settings(Protocol):
    """The settings that the loop reads."""

    @property
    def epochs(self) -> int:
        """Epochs of a stage."""

    @property
    def log_interval(self) -> int:
        """Steps between two records."""

    @property
    def checkpoint_interval(self) -> int:
        """Steps between two checkpoints within an epoch; 0 for none."""

    @property
    def tensorboard(self) -> bool:
        """Whether metrics go to TensorBoard too."""


class Progress(Protocol):
    """Where a run stands; all counts are of what is done."""

    epoch: int
    step: int
    global_step: int
    interval_seconds: float
    overhead_seconds: float

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on a step."""


S = TypeVar("S", bound=Descent)
C = TypeVar("C", bound=Settings)


class RunLoop(ABC, Generic[S, C]):
    """The loop over steps of a run in a run directory, of steps ``S`` with settings ``C``.

    Args:
        config: A validated configuration.
        run: Open run directory.
        device: Where the network runs.
        display: What the user sees.
        ranks: The processes that make this run together.
        clock: Told where the time goes.
    """

    def __init__(
        self,
        config: C,
        run: RunDirectory,
        device: torch.device,
        display: Display,
        ranks: Ranks,
        clock: Clock | None,
    ) -> None:
        self.config = config
        self.run_dir = run
        self.device = device
        self.display = display
        self.ranks = ranks
        self.clock = clock or Clock()
        self._stop = StopRequest()

    def _start(self, progress: Progress, steps_per_epoch: int) -> None:
        """Go on from where the run stands."""
        self._progress = progress
        self._steps_per_epoch = steps_per_epoch
        tensorboard = self.config.tensorboard and self.run_dir.writes
        self.metrics = MetricsLog(
            self.run_dir.metrics,
            self.run_dir.path / "tensorboard" if tensorboard else None,
            progress.global_step,
        )

    @abstractmethod
    def _save(self, step: S) -> None:
        """Write a checkpoint."""

    @abstractmethod
    def _log_interval(self, step: S) -> None:
        """Write a record of the steps since the last one."""

    def _part(self) -> str:
        """Which part of the run messages are about, in brackets behind a space; or nothing."""
        return ""

    def _run_steps(self, step: S, batches: Iterable[Any], run: Callable[[Any], None]) -> None:
        """Run a step for each batch, up to the end of the epoch."""
        progress = self._progress
        self.clock.lap(SET_UP)
        last = time.perf_counter()
        for batch in batches:
            self._lap(LOADING)
            run(batch)
            self._stop.settle()
            self._lap(STEP)
            progress.step += 1
            progress.global_step += 1
            now = time.perf_counter()
            progress.add_seconds(now - last)
            last = now
            self.display.advance()
            at_end = progress.step == self._steps_per_epoch
            if progress.step % self.config.log_interval == 0 or at_end:
                self._log_interval(step)
            self._lap(LOGGING)
            self._stop_or_save(step)
            self._lap(CHECKPOINT)

    def _lap(self, activity: str) -> None:
        self._progress.overhead_seconds += self.clock.lap(activity)

    def _stop_or_save(self, step: S) -> None:
        """Write a checkpoint if it is time for one or the run was asked to stop."""
        interval, done = self.config.checkpoint_interval, self._progress.step
        due = done == self._steps_per_epoch or (interval > 0 and done % interval == 0)
        if due or self._stop.signum is not None:
            self._require_finite(step.bad_step())
            self._save(step)
        self._raise_if_stopped()

    def _settle_and_raise(self) -> None:
        self._stop.settle()
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stop.signum is not None:
            raise Interrupted(self._stop.signum)

    def _require_finite(self, bad_step: int) -> None:
        """Refuse to go on, and to overwrite a good checkpoint, after a loss that is no number."""
        bad_step = self.ranks.agree(bad_step)
        if bad_step >= 0:
            message = (
                f"the loss or gradient of step {bad_step}{self._part()} is not finite; the last "
                f"good checkpoint is in {self.run_dir.path / 'checkpoints'}; try a smaller --lr or "
                "--grad-clip"
            )
            raise self.ranks.agreed(RunError(message))

    def _take(self, meter: Meter) -> tuple[Averages, Averages]:
        """The averages over all ranks (on rank 0), of which the meter is emptied."""
        self.ranks.collect(meter.sums)
        averages = meter.read()
        meter.reset()
        return averages

    def _interval_seconds(self, step: S) -> float:
        """Seconds since the last record, once the device is done and its numbers are finite."""
        self.clock.wait(self.device)
        self._require_finite(int(step.first_bad_step))
        seconds, self._progress.interval_seconds = self._progress.interval_seconds, 0.0
        return seconds

    def _report(
        self,
        average: Averages,
        images_per_second: float,
        etas: tuple[float, float],
        stage: int = 1,
        stages: int = 1,
    ) -> None:
        """Show how far the run is; ``etas`` are seconds left of the stage and of the run."""
        self.display.report(
            Status(
                stage=stage,
                stages=stages,
                epoch=self._progress.epoch + 1,
                epochs=self.config.epochs,
                step=self._progress.step,
                steps=self._steps_per_epoch,
                loss=average.loss or 0.0,
                accuracy=average.accuracy or 0.0,
                images_per_second=images_per_second,
                stage_eta=etas[0],
                search_eta=etas[1],
            )
        )
