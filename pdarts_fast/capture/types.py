"""What a way of recording and replaying a step has to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Capture(Protocol):
    """Records functions without arguments whose tensors stay in place, and replays them.

    Attributes:
        warmups: Calls of a function before it is recorded.
        broken: Set once a recording has failed: no other is tried.
    """

    warmups: int
    broken: bool

    def warm_up(self, function: Callable[[], None]) -> None:
        """Call a function `warmups` times as recording will call it."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record one call; what comes back repeats it on whatever the tensors hold by then.

        Raises:
            RuntimeError: The function does what cannot be recorded.
        """
        ...

    def release(self) -> None:
        """Free all recordings and their memory; new ones may follow."""
        ...
