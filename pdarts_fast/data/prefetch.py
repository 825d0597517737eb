"""Prepares the next batch of any loader while the step runs on the last one."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from pdarts_fast.data.loader import Batch, Loader

# A producer whose consumer went away looks for that this often, in seconds.
_PATIENCE = 0.1


class Prefetcher:
    """Runs a loader in a thread of its own, some batches ahead; implements ``Loader``.

    On CUDA the thread works on a stream of its own, so that gathering, copying and augmenting the
    next batch overlap with the step; the consumer's stream waits for the batch, the host does not.
    Batches and errors come in the loader's order.

    Args:
        loader: what to run ahead.
        device: where its batches are.
        depth: batches that are ready and not yet asked for.
    """

    def __init__(self, loader: Loader, device: torch.device, depth: int = 1) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.loader = loader
        self.device = device
        self._depth = depth
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_images(self) -> int:
        return self.loader.num_images

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of one epoch from batch ``start`` on; see ``Loader``."""
        return self._ahead(self.loader.epoch(epoch, start))

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        ready: queue.Queue[Any] = queue.Queue(self._depth)
        gone = threading.Event()
        # Daemon: a program that ends inside an epoch does not wait for a batch nobody wants.
        thread = threading.Thread(target=self._produce, args=(batches, ready, gone), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield self._handed_over(*item)
        finally:
            gone.set()
            thread.join()

    def _produce(
        self, batches: Iterator[Batch], ready: queue.Queue[Any], gone: threading.Event
    ) -> None:
        last: BaseException | None = None
        stream = self._stream
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                for batch in batches:
                    event = stream.record_event() if stream is not None else None
                    if not _put(ready, (batch, event), gone):
                        return
        # Whatever it is, it is raised where the batch is asked for.
        except BaseException as error:
            last = error
        _put(ready, last, gone)

    def _handed_over(self, batch: Batch, event: torch.cuda.Event | None) -> Batch:
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for tensor in batch:
                # Its memory may not be used anew before the consumer's work on it is done.
                tensor.record_stream(current)
        return batch


def _put(ready: queue.Queue[Any], item: Any, gone: threading.Event) -> bool:
    """Waits for a free place; False if the consumer went away."""
    while not gone.is_set():
        try:
            ready.put(item, timeout=_PATIENCE)
        except queue.Full:
            continue
        return True
    return False
