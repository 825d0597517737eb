"""SIGINT and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The search was asked to stop and has written a checkpoint.

    Attributes:
        signum: The signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Notes the first SIGINT or SIGTERM; the second one acts at once, as without this class.

    Use as a context manager around the work; must run in the main thread.

    Args:
        agree: Gives the largest of the values of all processes of a run, which have to stop at
            the same point; None in a run of one process.

    Attributes:
        signum: The signal that asked; in a run of several processes known after `settle`.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signum: int | None = None
        self._noted = 0
        self._agree = agree
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def settle(self) -> None:
        """Settle with the other processes, which call this too, whether to stop here."""
        if self._agree is not None:
            self.signum = self._agree(self._noted) or None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._noted = signum
        if self._agree is None:
            self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
