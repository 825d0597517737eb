"""Runs of a sweep as processes on this machine: one after the other, or one a GPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdarts_fast.run.signals import StopRequest
from pdarts_fast.sweep.directory import Outcome, SweepDirectory, last_line, utc_now
from pdarts_fast.sweep.display import Display
from pdarts_fast.sweep.plan import PlannedRun
from pdarts_fast.sweep.process import CHILD, describe_status, start_run

_POLL_S = 0.2

Ended = Callable[[PlannedRun, Outcome], None]


@dataclass
class _Active:
    run: PlannedRun
    slot: str | None
    process: subprocess.Popen[bytes]


class LocalRunner:
    """Starts runs while slots are free.

    Args:
        folder: The sweep; locked.
        slots: One entry for each run at a time: the GPU it may see, as CUDA_VISIBLE_DEVICES names
            it, or None to leave that variable as it is.
        display: What the user sees.
        ended: Called after each run that ended, once its outcome is written.
        program: What runs ``search ...``.
    """

    def __init__(
        self,
        folder: SweepDirectory,
        slots: Sequence[str | None],
        display: Display,
        ended: Ended,
        program: Sequence[str] = CHILD,
    ) -> None:
        self._folder = folder
        self._free = list(slots)
        self._display = display
        self._ended = ended
        self._program = program
        self._active: list[_Active] = []

    def run(self, runs: Sequence[PlannedRun], stop: StopRequest) -> None:
        """Run all of `runs`, or until `stop` is set: then running ones write a checkpoint and end.

        Args:
            runs: In this order.
            stop: Looked at several times a second.
        """
        waiting = list(runs)
        stopping = False
        try:
            while self._active or (waiting and not stopping):
                if stop.signum is not None and not stopping:
                    stopping = True
                    self._terminate()
                while waiting and self._free and not stopping:
                    self._start(waiting.pop(0))
                self._collect(stopping)
                time.sleep(_POLL_S)
        finally:
            # Only after an error or a second signal is anything left: it ends at once.
            self._terminate()
            for active in self._active:
                active.process.wait()

    def _start(self, run: PlannedRun) -> None:
        slot = self._free.pop(0)
        # A run that names its GPU sees all of them.
        own = slot is not None and run.settings.get("device") in ("auto", "cuda")
        self._folder.clear_outcome(run)
        process = start_run(
            run.arguments,
            self._folder.run_dir(run),
            self._folder.log(run),
            environment={"CUDA_VISIBLE_DEVICES": str(slot)} if own else None,
            program=self._program,
        )
        self._active.append(_Active(run, slot, process))
        self._display.started(run, f"GPU {slot}" if own else "")

    def _collect(self, stopping: bool) -> None:
        for active in list(self._active):
            status = active.process.poll()
            if status is None:
                self._display.progress(active.run, last_line(self._folder.log(active.run)))
                continue
            self._active.remove(active)
            self._free.append(active.slot)
            if active.process.stdin is not None:
                active.process.stdin.close()
            outcome = outcome_of(self._folder, active.run, status, stopping)
            self._folder.write_outcome(active.run, outcome)
            self._display.ended(active.run, outcome)
            self._ended(active.run, outcome)

    def _terminate(self) -> None:
        for active in self._active:
            active.process.terminate()


def outcome_of(folder: SweepDirectory, run: PlannedRun, status: int, stopping: bool) -> Outcome:
    """What the exit status of a run's process means.

    Args:
        folder: The sweep, for what the run said last.
        run: The run.
        status: Exit status, negative for a signal.
        stopping: Whether the sweep was asked to stop: a run that a signal ended then has not
            failed.
    """
    if status == 0:
        return Outcome("finished", 0, None, utc_now())
    if stopping and (status < 0 or status > 128):
        return Outcome("stopped", status, None, utc_now())
    said = last_line(folder.log(run)).removeprefix("pdarts-fast: error: ")
    how = describe_status(status)
    return Outcome("failed", status, f"{how}: {said}" if said else how, utc_now())
