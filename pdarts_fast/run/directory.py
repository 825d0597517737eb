"""The run directory: who may write into it, and the files a search keeps there."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pdarts_fast.config import SearchConfig
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.checkpoint import CheckpointFolder
from pdarts_fast.run.files import JsonLines, disk_errors, write_json

# Everything a run writes: what --overwrite removes.
RUN_FILES = [
    "config.json",
    "metrics.jsonl",
    "alphas.jsonl",
    "alphas.json",
    "genotype.json",
    "report.html",
    "cell-normal.svg",
    "cell-normal.png",
    "cell-reduce.svg",
    "cell-reduce.png",
]
RUN_FOLDERS = ("checkpoints", "tensorboard")
SUPERNETS = "supernet-stage*.safetensors"


def default_run_dir(config: SearchConfig) -> Path:
    """``runs/<dataset>-<seed>-<time>``, the time in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("runs") / f"{config.dataset}-{config.seed}-{now:%Y%m%dT%H%M%S}"


class RunDirectory:
    """A locked run directory.

    Args:
        path: Folder; made with its parents if it is not there.
        resume: Go on with what it holds.
        overwrite: Remove what an earlier run wrote there, and nothing else.

    Raises:
        UsageError: The folder holds a run and neither `resume` nor `overwrite` is given, or it is
            no folder.
        RunError: It cannot be written, or another process is writing a run into it.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise UsageError(f"--run-dir {path} is a file: give a folder")
        occupied = path.is_dir() and any(p.name != ".lock" for p in path.iterdir())
        if occupied and not (resume or overwrite):
            raise UsageError(
                f"--run-dir {path} exists and is not empty: --resume goes on with the search in "
                "it, --overwrite replaces it"
            )
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
        if occupied and overwrite:
            self._remove_run()
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.alphas = JsonLines(path / "alphas.jsonl")

    def _acquire(self) -> Any:
        file = open(self.path / ".lock", "w")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(
                f"another process is writing into {self.path}: wait for it or give another --run-dir"
            ) from None
        return file

    def _remove_run(self) -> None:
        with disk_errors(self.path):
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
            for supernet in self.path.glob(SUPERNETS):
                supernet.unlink()
            for name in RUN_FOLDERS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, atomically."""
        write_json(self.path / name, value)

    def file_lengths(self) -> dict[str, int]:
        """Lengths in bytes of the growing files, after forcing them to the disk."""
        return {file.path.name: file.sync() for file in (self.metrics, self.alphas)}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut the growing files back to the lengths of a checkpoint ({}: to nothing)."""
        for file in (self.metrics, self.alphas):
            file.truncate(lengths.get(file.path.name, 0))

    def close(self) -> None:
        """Close all files and release the lock."""
        self.metrics.close()
        self.alphas.close()
        self._lock.close()


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a run directory; None if there is none.

    Raises:
        RunError: It is damaged.
    """
    file = path / "config.json"
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
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
