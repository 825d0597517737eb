"""What ``accelerate`` says in the log: every line once a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from pdarts_fast.dropin import swap
from pdarts_fast.kernels import backends

logger = logging.getLogger(__name__)

said: set[str] = set()
"""Lines so far."""


def say_once(level: int, line: str) -> None:
    """Logs a line unless it was logged before: scripts build networks again and again."""
    if line not in said:
        said.add(line)
        logger.log(level, line)


@dataclass
class Report:
    """What happened to the cells of a model.

    Attributes:
        done: Path, cell, and what of it stays with its own modules.
        left: Path, cell, and why it is left as it is.
    """

    done: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    left: list[tuple[str, nn.Module, str]] = field(default_factory=list)

    def log(self, model: nn.Module, backend: str, ours: bool) -> None:
        """Logs everything.

        Args:
            model: Whose cells these are.
            backend: As given to ``accelerate``.
            ours: Whether the model holds a supernet of this package.
        """
        for level, line in [*self._lines(), self._summary(model, backend, ours)]:
            say_once(level, line)

    def _lines(self) -> Iterator[tuple[int, str]]:
        groups: dict[tuple[str, str], list[str]] = {}
        for path, cell, reason in self.left:
            key = (swap.own_class(cell).__name__, reason)
            groups.setdefault(key, []).append(path or "the model")
        for (name, reason), paths in groups.items():
            yield logging.WARNING, f"left as it is: {', '.join(paths)} ({name}): {reason}"
        notes: dict[str, list[str]] = {}
        for path, _, note in self.done:
            if note:
                notes.setdefault(note, []).append(path or "the model")
        for note, paths in notes.items():
            yield logging.INFO, f"accelerated but for its {note}: {', '.join(paths)}"

    def _summary(self, model: nn.Module, backend: str, ours: bool) -> tuple[int, str]:
        name = swap.own_class(model).__name__
        if not self.done and not self.left and not ours:
            line = f"{name} is left as it is: it holds no cells of P-DARTS or DARTS"
            return logging.WARNING, line
        device = next(model.parameters()).device
        chosen = backends.resolve(backend, device)
        if ours:
            return logging.INFO, f"{name} is this package's own; it runs on backend {chosen}"
        if chosen == backends.REFERENCE:
            return logging.INFO, f"{name} runs as it is: no faster backend serves {device.type}"
        done, total = len(self.done), len(self.done) + len(self.left)
        return logging.INFO, f"{done} of {total} cells of {name} run on backend {chosen}"
