"""Which loader runs: ``--loader auto|dali|resident|torchvision``, and why."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from pdarts_fast.data import dali_pipeline
from pdarts_fast.data.base import ImageData
from pdarts_fast.data.image_folder import Listing
from pdarts_fast.data.loader import Loader, ResidentLoader
from pdarts_fast.data.prefetch import Prefetcher
from pdarts_fast.errors import UsageError

log = logging.getLogger(__name__)


def choose_loader(name: str, device: torch.device, *, files: bool) -> str:
    """The loader that a name of ``--loader`` stands for; says once in the log what runs and why.

    ``auto`` takes DALI on CUDA. On the CPU it takes what `benchmarks/test_loaders.py` measured as
    the fastest, see the comments here and docs/loaders.md.

    Args:
        name: ``auto``, ``dali``, ``resident`` or ``torchvision``.
        device: where batches appear.
        files: images are read from files as they are needed; else they are in memory.

    Returns:
        ``dali``, ``resident`` or ``torchvision``.

    Raises:
        UsageError: DALI was asked for and is not there.
    """
    lack = dali_pipeline.missing()
    if name == "dali" and lack is not None:
        raise UsageError(f"--loader dali: {lack}; or give --loader auto")
    if name != "auto":
        chosen, reason = name, f"--loader {name}"
    elif device.type == "cuda" and lack is None:
        chosen, reason = "dali", "auto: augments on the GPU"
    elif files:
        chosen, reason = _files_without_gpu(device, lack)
    else:
        # One thread of two, CIFAR, batch 96, images/s against the resident loader's: DALI 0.4,
        # torchvision 0.2 without and 0.1 with a worker process.
        chosen = "resident"
        reason = "auto: the fastest on a CPU" if device.type == "cpu" else f"auto: {lack}"
    log.info("loader: %s (%s)", chosen, reason)
    return chosen


def _files_without_gpu(device: torch.device, lack: str | None) -> tuple[str, str]:
    if lack is not None:
        return "torchvision", f"auto: {lack}"
    return "dali", "auto: the fastest on a CPU"


def array_loader(
    name: str,
    data: ImageData,
    indices: np.ndarray | None = None,
    *,
    device: torch.device,
    workers: int = 0,
    **options: Any,
) -> Loader:
    """A loader of images in memory.

    Args:
        name: from :func:`choose_loader`.
        data: the images, on the CPU.
        indices: the images to serve; None for all.
        device: where batches appear.
        workers: threads of DALI (at least one), processes of torchvision.
        options: the other arguments of :class:`ArrayLoader`.
    """
    if name == "dali":
        from pdarts_fast.data.dali_arrays import DaliLoader

        return DaliLoader(data, indices, device=device, workers=workers, **options)
    if name == "torchvision":
        from pdarts_fast.data.torchvision_arrays import TorchvisionLoader

        torchvision = TorchvisionLoader(data, indices, device=device, workers=workers, **options)
        return _ahead(torchvision, device)
    return _ahead(ResidentLoader(data, indices, device=device, **options), device)


def file_loader(name: str, listing: Listing, *, device: torch.device, **options: Any) -> Loader:
    """A loader of image files.

    Args:
        name: ``dali`` or ``torchvision``, from :func:`choose_loader`.
        listing: the files and labels.
        device: where batches appear.
        options: the other arguments of :class:`FileLoader`.
    """
    if name == "dali":
        from pdarts_fast.data.dali_files import DaliFileLoader

        return DaliFileLoader(listing, device=device, **options)
    from pdarts_fast.data.streaming import StreamingLoader

    return _ahead(StreamingLoader(listing, device=device, **options), device)


def _ahead(loader: Loader, device: torch.device) -> Loader:
    """The loader a batch ahead where that gains: its work overlaps with the step on a GPU only."""
    return Prefetcher(loader, device) if device.type == "cuda" else loader
