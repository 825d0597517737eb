"""Batches made by torch's data loader in worker processes, and what its failures look like."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pdarts_fast.errors import RunError


def worker_batches(
    dataset: Dataset,
    batches: Sequence[Sequence[int]],
    *,
    workers: int,
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Yields a collated batch for each list of places, made ahead by worker processes.

    Args:
        dataset: gives the item at a place.
        batches: the places of each batch.
        workers: processes; 0 makes each batch in this one when it is asked for.
        device: where the batch goes next: for CUDA it is held in pinned memory.
        collate: makes a batch of items; None stacks tensors.

    Raises:
        RunError: a worker died or raised an error.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        # Without one, the data loader would draw from the global generator at every epoch.
        generator=torch.Generator().manual_seed(0),
    )
    made = iter(loader)
    for _ in batches:
        try:
            batch = next(made)
        except Exception as error:
            reason = " ".join(str(error).split()[-40:]) or type(error).__name__
            raise RunError(
                f"--loader torchvision: making a batch failed in one of {workers} worker processes "
                f"({reason}): if memory or shared memory is full, give a smaller --workers"
            ) from error
        yield batch


def _start_worker(worker: int) -> None:
    # What belongs to the main process, its DALI pipelines for one, is not to be ended here.
    gc.freeze()
    # Ctrl+C reaches every process of a terminal, what torchrun sends every process of a group: the
    # main process answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
