"""Where the wall time of a run goes: steps, validation, and everything around them."""

from __future__ import annotations

import time

import torch

from pdarts_fast.run.progress import duration

SET_UP, STEP, VALIDATION = "set-up", "steps", "validation"
LOADING, LOGGING, CHECKPOINT, REPORT = "loading", "logging", "checkpoints", "report"
OVERHEAD = (LOADING, LOGGING, CHECKPOINT, REPORT)
"""What a run does besides computing; set-up is there once, whatever the length of a run."""


class Clock:
    """Divides the time since it was made among activities.

    Attributes:
        seconds: Time of each activity, in this process.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((SET_UP, STEP, VALIDATION, *OVERHEAD), 0.0)
        self._last = time.perf_counter()

    def lap(self, activity: str) -> float:
        """Count the time since the last call as spent on an activity.

        Returns:
            That time in seconds if the activity is overhead, else 0.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.seconds[activity] += seconds
        return seconds if activity in OVERHEAD else 0.0

    def wait(self, device: torch.device) -> None:
        """Let a GPU finish its steps and count that as theirs, before something reads results."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.lap(STEP)

    @property
    def overhead(self) -> float:
        """Share of the time without set-up that was not spent on steps and validations."""
        total = sum(self.seconds.values()) - self.seconds[SET_UP]
        return sum(self.seconds[name] for name in OVERHEAD) / total if total else 0.0

    def summary(self) -> str:
        """One line for the end of a run, of this process's time."""
        parts = [f"{name} {duration(self.seconds[name])}" for name in (SET_UP, STEP, VALIDATION)]
        around = ", ".join(f"{name} {self.seconds[name]:.1f} s" for name in OVERHEAD)
        return f"time: {', '.join(parts)}; outside the steps {100 * self.overhead:.1f}% ({around})"
