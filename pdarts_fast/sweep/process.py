"""One run of a sweep as a process: how it is started, goes on, and ends with what started it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CHILD = (sys.executable, "-m", "pdarts_fast.sweep.process")
# A run whose sweep was killed needs a moment to end at its next step.
_LOCK_WAIT_S = 120.0


def start_run(
    arguments: Sequence[str],
    run_dir: Path,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    program: Sequence[str] = CHILD,
) -> subprocess.Popen[bytes]:
    """Start a search that goes on with what its folder holds and ends when this process ends.

    Args:
        arguments: Flags of the search command, without those of the run directory.
        run_dir: Its folder.
        log: File to which its output is appended.
        environment: Variables that differ from those of this process.
        cwd: Where it runs (default: here).
        program: What runs ``search ...``.
    """
    resume = ["--resume"] if has_begun(run_dir) else []
    words = [*program, "search", *arguments, "--run-dir", str(run_dir), *resume]
    with open(log, "ab") as output:
        # The pipe closes when this process ends, however it ends: the run's sign to stop. In a
        # session of its own it gets no Ctrl+C of the terminal besides what the sweep sends.
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            cwd=cwd,
            start_new_session=True,
        )


def has_begun(run_dir: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return run_dir.is_dir() and any(file.name != ".lock" for file in run_dir.iterdir())


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"stopped by {signal.Signals(status - 128).name}"
    return f"exit status {status}"


def main(arguments: Sequence[str]) -> int:
    """What a run's process does: the command, until standard input closes."""
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    if "--run-dir" in arguments:
        _wait_for_lock(Path(arguments[arguments.index("--run-dir") + 1]))
    from pdarts_fast.cli import main as command

    return command(arguments)


def _stop_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_lock(run_dir: Path) -> None:
    """Wait while another process, left over by a sweep that was killed, writes into a folder.

    If it does not end in time the search itself refuses the folder, in one line.
    """
    path = run_dir / ".lock"
    if not path.exists():
        return
    deadline = time.monotonic() + _LOCK_WAIT_S
    with open(path, "w") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
