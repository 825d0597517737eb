"""The folder of a sweep: its plan, a folder, a log and an outcome for each run, and a lock."""

from __future__ import annotations

import datetime
import fcntl
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.run.files import disk_errors, write_json
from pdarts_fast.run.report_data import read_json
from pdarts_fast.sweep.plan import Plan, PlannedRun

PLAN_FILE = "plan.json"
SUMMARY_FILE = "sweep.json"
_LOCK = ".lock"

Status = Literal["finished", "failed", "stopped", "waiting"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended last.

    Attributes:
        status: finished; failed; stopped with the sweep, with a checkpoint; waiting: not begun,
            or killed together with the sweep.
        exit_status: Of its process, negative for a signal; None if there was none.
        error: What it said last, if it failed.
        ended: Time in UTC, ISO 8601.
    """

    status: Status
    exit_status: int | None = None
    error: str | None = None
    ended: str | None = None


WAITING = Outcome("waiting")


def default_sweep_dir(name: str) -> Path:
    """``runs/sweep-<name>-<time>``, the time in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("runs") / f"sweep-{name}-{now:%Y%m%dT%H%M%S}"


def utc_now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class SweepDirectory:
    """Paths and files of a sweep; reading needs no lock.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def run_dir(self, run: PlannedRun) -> Path:
        """Folder of a run, as the search command writes it."""
        return self.path / "runs" / run.name

    def log(self, run: PlannedRun) -> Path:
        """What a run has printed, all attempts."""
        return self.path / "logs" / f"{run.name}.log"

    @property
    def has_plan(self) -> bool:
        """Whether the folder holds a sweep."""
        return (self.path / PLAN_FILE).is_file()

    def require_new(self) -> None:
        """Raise `UsageError` if a new sweep may not be written into the folder."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--sweep-dir {self.path} is a file: give a folder")
        if self.has_plan:
            raise UsageError(
                f"--sweep-dir {self.path} holds a sweep: --resume goes on with it; give another "
                "folder for a new one"
            )
        if not self.path.is_dir():
            return
        with disk_errors(self.path):
            if any(file.name != _LOCK for file in self.path.iterdir()):
                raise UsageError(
                    f"--sweep-dir {self.path} is not empty and holds no sweep: give another folder"
                )

    def open(self) -> None:
        """Make the folder and lock it until `close`.

        Raises:
            RunError: It cannot be written, or another process runs this sweep.
        """
        with disk_errors(self.path):
            for folder in ("runs", "logs", "outcomes"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / _LOCK, "w")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunError(
                f"another process is running the sweep in {self.path}: wait for it, or give "
                "another --sweep-dir"
            ) from None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def write_plan(self, plan: Plan, command: str) -> None:
        """Write the plan and the command line that it comes from, atomically."""
        content = {"kind": "sweep", "command": command, "created": self.created() or utc_now()}
        write_json(self.path / PLAN_FILE, content | {"plan": plan.to_json()})

    def read_plan(self) -> Plan:
        """The plan of the sweep.

        Raises:
            UsageError: The folder holds no sweep.
            RunError: The plan is damaged.
        """
        values = self._plan_file().get("plan")
        try:
            return Plan.from_json(values if isinstance(values, dict) else {})
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path / PLAN_FILE} is damaged ({error!r}): start again in another folder"
            ) from error

    def created(self) -> str:
        """When the sweep began, or an empty text if it has not."""
        return str(self._plan_file().get("created") or "") if self.has_plan else ""

    def command(self) -> str:
        """The command line of the sweep."""
        return str(self._plan_file().get("command") or "")

    def _plan_file(self) -> dict[str, Any]:
        if not self.has_plan:
            raise UsageError(f"{self.path}: no {PLAN_FILE} in it; wanted the folder of a sweep")
        return read_json(self.path / PLAN_FILE)

    def outcome(self, run: PlannedRun) -> Outcome:
        """How a run ended last."""
        path = self._outcome_path(run)
        if not path.is_file():
            return WAITING
        try:
            return Outcome(**read_json(path))
        except TypeError as error:
            raise RunError(f"{path} is damaged ({error}): remove it to run it again") from error

    def write_outcome(self, run: PlannedRun, outcome: Outcome) -> None:
        """Note how a run ended, atomically."""
        write_json(self._outcome_path(run), asdict(outcome))

    def clear_outcome(self, run: PlannedRun) -> None:
        """Forget how a run ended: it is started again."""
        with disk_errors(self._outcome_path(run)):
            self._outcome_path(run).unlink(missing_ok=True)

    def _outcome_path(self, run: PlannedRun) -> Path:
        return self.path / "outcomes" / f"{run.name}.json"


def last_line(log: Path, most: int = 4096) -> str:
    """The last line of a log that is not blank; an empty text if there is none.

    Args:
        log: The file; it need not exist.
        most: Bytes that are read at its end.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - most))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
