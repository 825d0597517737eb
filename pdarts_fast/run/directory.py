"""The run directory: who may write into it, and the files a search keeps there."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.checkpoint import CheckpointFolder
from pdarts_fast.run.files import JsonLines, disk_errors, write_json

LOCK = ".lock"
METRICS = "metrics.jsonl"
ALPHAS = "alphas.jsonl"
# Everything a run writes: what --overwrite removes.
RUN_FILES = [
    "config.json",
    METRICS,
    ALPHAS,
    "alphas.json",
    "genotype.json",
    "costs.json",
    "report.html",
    "cell-normal.svg",
    "cell-normal.png",
    "cell-reduce.svg",
    "cell-reduce.png",
    "weights-best.safetensors",
    "weights-last.safetensors",
]
RUN_FOLDERS = ("checkpoints", "tensorboard", "select-perturbation")
SUPERNETS = "supernet-stage*.safetensors"


# A forked process (one that decodes images) would hold the lock on after this one was killed.
_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _LOCKS])


def default_run_dir(name: str, seed: int) -> Path:
    """``runs/<name>-<seed>-<time>``, the time in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("runs") / f"{name}-{seed}-{now:%Y%m%dT%H%M%S}"


class RunDirectory:
    """A locked run directory.

    Args:
        path: Folder; made with its parents if it is not there.
        resume: Go on with what it holds.
        overwrite: Remove what an earlier run wrote there, and nothing else.
        logs: Files of JSON lines that the run writes.

    Raises:
        UsageError: The folder holds a run and neither `resume` nor `overwrite` is given, or it is
            no folder.
        RunError: It cannot be written, or another process is writing a run into it.

    Attributes:
        writes: Whether this process writes the files of the run.
    """

    writes = True

    def __init__(
        self,
        path: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        logs: Sequence[str] = (METRICS, ALPHAS),
    ) -> None:
        self.path = path
        require_usable(path, resume=resume, overwrite=overwrite)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
        if overwrite:
            self._remove_run()
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self._logs = {name: JsonLines(path / name) for name in logs}

    @property
    def metrics(self) -> JsonLines:
        """The open metrics.jsonl."""
        return self._logs[METRICS]

    @property
    def alphas(self) -> JsonLines:
        """The open alphas.jsonl of a search."""
        return self._logs[ALPHAS]

    def _acquire(self) -> Any:
        # Whoever holds the lock has written the content: it stays until this one has it.
        file = open(self.path / LOCK, "a")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(
                f"another process is writing into {self.path}: wait for it, or give another "
                "--run-dir"
            ) from None
        _LOCKS.add(file)
        return file

    def mark(self, launch: str) -> None:
        """Note which launch of several attempts the run is from; `launch_of` reads it."""
        with disk_errors(self.path):
            self._lock.truncate(0)
            self._lock.write(launch)
            self._lock.flush()

    def _remove_run(self) -> None:
        # The checkpoints first: if this is cut short, nothing is left that --resume would take.
        with disk_errors(self.path):
            for name in RUN_FOLDERS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
            for pattern in (*RUN_FILES, SUPERNETS):
                for file in (*self.path.glob(pattern), *self.path.glob(f".{pattern}.tmp")):
                    file.unlink()

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        write_json(self.path / name, value)

    def file_lengths(self) -> dict[str, int]:
        """Lengths in bytes of the growing files, after forcing them to the disk."""
        return {name: file.sync() for name, file in self._logs.items()}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut the growing files back to the lengths of a checkpoint ({}: to nothing)."""
        for name, file in self._logs.items():
            file.truncate(lengths.get(name, 0))

    def close(self) -> None:
        """Close all files and release the lock."""
        for file in self._logs.values():
            file.close()
        self._lock.close()


def launch_of(path: Path) -> str:
    """What `RunDirectory.mark` noted in a folder; empty if nothing."""
    try:
        return (path / LOCK).read_text()
    except FileNotFoundError:
        return ""


def require_usable(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raise `UsageError` if a run may not write into a folder; arguments as in `RunDirectory`."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"--run-dir {path} is a file: give a folder")
    if resume or overwrite or not path.is_dir():
        return
    with disk_errors(path):
        occupied = any(file.name != LOCK for file in path.iterdir())
    if occupied:
        raise UsageError(
            f"--run-dir {path} exists and is not empty: --resume goes on with the run in it, "
            "--overwrite replaces it"
        )


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a run directory; None if there is none.

    Raises:
        RunError: It is damaged.
    """
    file = path / "config.json"
    try:
        value = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read ({error}): give --overwrite to start again"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise RunError(f"{file} has no entry 'config': give --overwrite to start again")
    return value


def free_gib(path: Path) -> float:
    """Free space in GiB on the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize / 2**30
