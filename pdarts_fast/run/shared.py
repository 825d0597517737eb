"""The run directory of several ranks: that of rank 0 is real, the others write nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pdarts_fast.distributed import Ranks
from pdarts_fast.errors import UsageError
from pdarts_fast.launch import Launch
from pdarts_fast.run.checkpoint import CheckpointFolder
from pdarts_fast.run.directory import ALPHAS, METRICS, RunDirectory, launch_of
from pdarts_fast.settings import Settings

S = TypeVar("S", bound=Settings)
T = TypeVar("T")


class _SharedCheckpoints(CheckpointFolder):
    """Checkpoints that rank 0 writes, and reads for all.

    The others wait until one is written: if they ended before, torchrun would end rank 0 too.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder)
        self._ranks = ranks

    def save(self, state: dict[str, Any]) -> Path:
        write = super().save
        return self._ranks.together(lambda: write(state) if self._ranks.is_first else self.folder)

    def load(self) -> dict[str, Any] | None:
        read = super().load
        state = self._ranks.together(lambda: read() if self._ranks.is_first else None)
        return self._ranks.broadcast_state(state)


class _NoLines:
    """A file of JSON lines that keeps nothing."""

    def write(self, record: dict[str, Any]) -> None:
        """Nothing: rank 0 writes the record."""


class _FollowingDirectory(RunDirectory):
    """What ranks other than 0 have in place of a run directory."""

    writes = False

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> Any:
        return _NoLines()

    alphas = metrics

    def write_json(self, name: str, value: Any) -> None:
        """Nothing: rank 0 writes the file."""

    def file_lengths(self) -> dict[str, int]:
        return {}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Nothing: rank 0 has the files."""

    def close(self) -> None:
        """Nothing is open."""


def open_run(
    ranks: Ranks,
    path: Path,
    *,
    resume: bool,
    overwrite: bool,
    logs: Sequence[str] = (METRICS, ALPHAS),
) -> RunDirectory:
    """Opens the run directory of a command on all ranks.

    Args:
        ranks: All processes of the run; each gets its own view.
        path: The folder.
        resume: Whether to go on with the run in it.
        overwrite: Whether to replace the run in it.
        logs: Files of JSON lines that the run writes.

    Raises:
        UsageError, RunError: As `RunDirectory` says.
    """

    def real() -> RunDirectory:
        run = RunDirectory(path, resume=resume, overwrite=overwrite, logs=logs)
        run.mark(ranks.launch.identity)
        return run

    run = ranks.together(lambda: real() if ranks.is_first else _FollowingDirectory(path))
    if ranks.size > 1:
        run.checkpoints = _SharedCheckpoints(path / "checkpoints", ranks)
    return run


def load_on_all(ranks: Ranks, download: bool, load: Callable[[], T]) -> T:
    """What `load` gives on each rank; one rank of each machine downloads before the others read.

    Raises:
        UsageError, RunError: As `load` does, on any rank.
    """
    if download and ranks.size > 1:
        ranks.together(lambda: None if ranks.launch.local_rank else load())
    return ranks.together(load)


def for_this_attempt(launch: Launch, config: S) -> S:
    """The settings with which processes that torchrun has started again go on with their run.

    Args:
        launch: How the processes were started.
        config: Settings with ``run_dir``, ``resume`` and ``overwrite``, as the user gave them.

    Raises:
        UsageError: torchrun may restart the processes, which could not find their run.
    """
    run_dir: Path | None = config.run_dir  # type: ignore[attr-defined]
    if launch.max_restarts and run_dir is None:
        raise UsageError(
            "torchrun --max-restarts needs --run-dir DIR: a restart goes on with the run there"
        )
    if run_dir is None or not restarted_in(launch, run_dir):
        return config
    return dataclasses.replace(config, resume=True, overwrite=False)  # type: ignore[call-arg]


def restarted_in(launch: Launch, path: Path) -> bool:
    """Whether torchrun has started the processes again and an attempt before wrote into `path`."""
    return bool(launch.restarts) and launch_of(path) == launch.identity
