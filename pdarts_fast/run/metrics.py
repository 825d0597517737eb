"""Where metrics go: metrics.jsonl always, TensorBoard if asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from pdarts_fast.errors import UsageError
from pdarts_fast.run.files import JsonLines

_KEYS = frozenset({"kind", "stage", "epoch", "step"})


class MetricsLog:
    """Appends records to metrics.jsonl and, if given a folder, to TensorBoard event files.

    Args:
        file: The open metrics.jsonl.
        tensorboard: Folder of event files, or None.
        step: Global step at which this process starts; later events of an earlier process that
            was killed are hidden.
    """

    def __init__(self, file: JsonLines, tensorboard: Path | None, step: int = 0) -> None:
        self._file = file
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; see docs/run-directory.md for its keys."""
        self._file.write(record)
        if self._writer is None:
            return
        for key, value in record.items():
            if key not in _KEYS and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        """Flush and close the event files (the caller owns metrics.jsonl)."""
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Raise `UsageError` if the extra that --tensorboard needs is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the extra: pip install 'pdarts-fast[tensorboard]'")
