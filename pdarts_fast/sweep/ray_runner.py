"""Runs of a sweep as tasks of Ray, which places them and starts them again after a crash."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.sweep.directory import Outcome, SweepDirectory, last_line, utc_now
from pdarts_fast.sweep.display import Display
from pdarts_fast.sweep.plan import PlannedRun
from pdarts_fast.sweep.process import CHILD, describe_status, start_run
from pdarts_fast.sweep.runner import Ended, outcome_of

DEFAULT_RETRIES = 3
_WAIT_S = 0.5
_POLL_S = 0.1


class RunDied(RuntimeError):
    """The process of a run was ended by a signal; Ray starts it again from its checkpoint."""


@dataclass(frozen=True)
class Job:
    """What a task needs to know; paths are those of a file system that all nodes see.

    Attributes:
        arguments: Flags of the search command, without those of the run directory.
        run_dir: Folder of the run, absolute.
        log: Its log, absolute.
        cwd: Folder that relative paths among the flags belong to, absolute.
        program: What runs ``search ...``.
    """

    arguments: tuple[str, ...]
    run_dir: Path
    log: Path
    cwd: Path
    program: tuple[str, ...]


def require_ray() -> None:
    """Raise `UsageError` if the extra that --ray needs is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs the extra: pip install 'pdarts-fast[ray]'")


def run_job(job: Job) -> int:
    """The body of a task: one run as a process, up to its end.

    Returns:
        Its exit status.

    Raises:
        RunError: The node does not see the folder of the sweep.
        RunDied: A signal ended it.
    """
    for folder in (job.log.parent, job.cwd):
        if not folder.is_dir():
            raise RunError(
                f"{os.uname().nodename} does not see {folder}: all nodes have to share the file "
                "system of the sweep and of the folder it is started in"
            )
    process = start_run(job.arguments, job.run_dir, job.log, cwd=job.cwd, program=job.program)
    try:
        # Ray cancels between two steps of Python, not inside a wait for a process.
        while (status := process.poll()) is None:
            time.sleep(_POLL_S)
    except BaseException:
        # Cancelled: the run writes a checkpoint and ends.
        process.terminate()
        process.wait()
        raise
    if status < 0 or status > 128:
        raise RunDied(f"{describe_status(status)}: {last_line(job.log)}")
    return status


class RayRunner:
    """Hands all runs to Ray and waits.

    Args:
        folder: The sweep; locked.
        address: Of the cluster, as ``ray.init`` takes it; an empty text for the running one, or a
            new one on this machine.
        retries: How often Ray starts a run again whose process or node died.
        display: What the user sees.
        ended: Called after each run that ended, once its outcome is written.
        program: What runs ``search ...``.

    Raises:
        UsageError: Ray is not installed.
        RunError: The cluster cannot be reached.
    """

    def __init__(
        self,
        folder: SweepDirectory,
        address: str,
        retries: int,
        display: Display,
        ended: Ended,
        program: Sequence[str] = CHILD,
    ) -> None:
        require_ray()
        # Ray's statistics of use are sent only where the user's own environment says so.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray: Any = ray
        self._folder = folder
        self._retries = retries
        self._display = display
        self._ended = ended
        self._program = tuple(program)
        self._begun: set[str] = set()
        self._own = not ray.is_initialized()
        try:
            if self._own:
                self._ray.init(
                    address=address or None, log_to_driver=False, logging_level="warning"
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"--ray {address}: no cluster there ({error})") from error
        self._gpus = ray.cluster_resources().get("GPU", 0) > 0

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._own:
            self._ray.shutdown()

    def run(self, runs: Sequence[PlannedRun], stop: StopRequest) -> None:
        """Run all of `runs`, or until `stop` is set: then running ones write a checkpoint and end.

        Args:
            runs: Handed over in this order.
            stop: Looked at twice a second.
        """
        waiting: dict[Any, PlannedRun] = {}
        sizes = {run.name: self._log_size(run) for run in runs}
        for run in runs:
            self._folder.clear_outcome(run)
            waiting[self._submit(run)] = run
        stopping = False
        while waiting:
            if stop.signum is not None and not stopping:
                stopping = True
                for reference in waiting:
                    self._ray.cancel(reference)
            ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=_WAIT_S)
            for run in waiting.values():
                self._show(run, sizes[run.name])
            for reference in ready:
                self._collect(waiting.pop(reference), reference, stopping)

    def _submit(self, run: PlannedRun) -> Any:
        device = str(run.settings.get("device"))
        remote: Any = self._ray.remote(
            num_cpus=run.settings.get("threads") or 1,
            num_gpus=1 if device == "cuda" or (device == "auto" and self._gpus) else 0,
            max_retries=self._retries,
            retry_exceptions=[RunDied],
        )(run_job)
        job = Job(
            run.arguments,
            self._folder.run_dir(run).resolve(),
            self._folder.log(run).resolve(),
            Path.cwd(),
            self._program,
        )
        return remote.options(name=f"pdarts-fast {run.name}").remote(job)

    def _log_size(self, run: PlannedRun) -> int:
        log = self._folder.log(run)
        return log.stat().st_size if log.exists() else 0

    def _show(self, run: PlannedRun, size_before: int) -> None:
        if run.name not in self._begun:
            if self._log_size(run) == size_before:
                return
            self._begun.add(run.name)
            self._display.started(run, "Ray")
        self._display.progress(run, last_line(self._folder.log(run)))

    def _collect(self, run: PlannedRun, reference: Any, stopping: bool) -> None:
        try:
            status = self._ray.get(reference)
            outcome = outcome_of(self._folder, run, status, stopping)
        except (self._ray.exceptions.RayError, RunDied, RunError) as error:
            if stopping:
                outcome = Outcome("stopped", None, None, utc_now())
            else:
                outcome = Outcome("failed", None, _reason(error), utc_now())
        self._folder.write_outcome(run, outcome)
        self._display.ended(run, outcome)
        self._ended(run, outcome)


def _reason(error: BaseException) -> str:
    """What went wrong in a task, without Ray's traceback."""
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split())[:500] or type(cause).__name__
