"""Batches read from image files as they are needed, for data sets larger than the memory.

Decoding and augmentation are torchvision's, in worker processes. The random choices of an image
depend on the seed, the stream, the epoch and the image only: neither on the number of workers nor
on where iteration starts.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from pdarts_fast.data.image_folder import Listing, list_images, to_rgb
from pdarts_fast.data.loader import keyed_generator
from pdarts_fast.data.shard import Shard
from pdarts_fast.errors import RunError, UsageError

# Mean and standard deviation of the ImageNet training images, as published and commonly used.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# An image is evaluated on the centre of a square this much larger: 256 for 224.
_EVALUATION_MARGIN = 256 / 224


@dataclass(frozen=True)
class ImageFiles:
    """The files of an image folder.

    Attributes:
        classes: Class names by label.
        train: Training files with their labels.
        test: Test files with theirs.
    """

    classes: tuple[str, ...]
    train: Listing
    test: Listing


def find_images(folder: Path) -> ImageFiles:
    """Lists ``train/<class>/`` and ``val/<class>/`` (or ``test``), or ``<class>/``.

    Files and the split are those of `load_image_folder`; nothing is decoded.

    Raises:
        UsageError: ``folder`` does not exist.
        RunError: fewer than two classes, an empty class, no test image.
    """
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    classes, (train, test) = list_images(folder)
    if not len(test.files):
        raise RunError(f"{test.where}: no test image: add some to each class")
    return ImageFiles(classes, train, test)


@dataclass(frozen=True)
class StreamAugmentation:
    """What happens to each training image: random resized crop, flip, colour jitter.

    Attributes:
        flip: mirror left to right with probability 1/2.
        jitter: strength of the jitter of brightness, contrast, saturation and hue.

    Source: arXiv 1904.12760, section 4.3; arXiv 1806.09055, section A.2.2.
    """

    flip: bool = True
    jitter: tuple[float, ...] = (0.4, 0.4, 0.4, 0.2)

    def transform(self, image_size: int) -> transforms.Compose:
        """The transform from a PIL image to one of ``image_size``×``image_size``."""
        steps: list[Any] = [transforms.RandomResizedCrop(image_size)]
        if self.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if any(self.jitter):
            steps.append(transforms.ColorJitter(*self.jitter))
        return transforms.Compose(steps)


class StreamingLoader:
    """Serves image files through worker processes; implements ``Loader``.

    Args:
        listing: the files and labels.
        batch_size: images a batch.
        image_size: side of the images in pixels.
        augmentation: None serves the centre of each image, as for evaluation: its shorter side is
            scaled to ``256 / 224 * image_size``.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        seed: the run's seed.
        stream: names this loader's purpose; loaders of different streams draw independently.
        shuffle: a new order each epoch.
        device: where batches appear.
        workers: decoding processes; 0 decodes in this one.
        rank: this process among those that share each batch; see ``Shard``.
        world_size: how many they are.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: a file cannot be decoded.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        batch_size: int,
        image_size: int,
        augmentation: StreamAugmentation | None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        seed: int,
        stream: str,
        shuffle: bool,
        device: torch.device | str,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not len(listing.files):
            raise ValueError(f"{listing.where}: a loader needs at least one image, got none")
        # One array instead of a list: workers would copy a list bit by bit (reference counts).
        self._paths = np.array([os.fsencode(path) for path in listing.files])
        self._labels = torch.from_numpy(listing.labels)
        self._batch_size = batch_size
        self._shard = Shard(rank, world_size)
        self._image_size = image_size
        self._augmentation = augmentation
        self._key = (seed, stream)
        self._shuffle = shuffle
        self._workers = workers
        self.device = torch.device(device)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (mean, std)
        )

    @property
    def num_images(self) -> int:
        return len(self._paths)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self._batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the batches of one epoch from batch ``start`` on; see ``Loader``.

        Raises:
            ValueError: ``epoch`` is negative, or ``start`` is not in ``0..len(self)``.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.arange(self.num_images)
        if self._shuffle:
            order = keyed_generator(*self._key, epoch, "order").permutation(order)
        starts = range(0, len(order), self._batch_size)
        stops = (min(i + self._batch_size, len(order)) for i in starts)
        rows = [order[self._shard.places(i, j)] for i, j in zip(starts, stops, strict=True)]
        batches = DataLoader(
            _Decoder(self._paths, self._image_size, self._augmentation, (*self._key, epoch)),
            batch_sampler=[batch.tolist() for batch in rows[start:]],
            collate_fn=_collate,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals,
            # Without one, the data loader would draw from the global generator at every epoch.
            generator=torch.Generator().manual_seed(0),
        )
        for batch, images in zip(rows[start:], batches, strict=True):
            if isinstance(images, str):
                raise RunError(f"{images}: replace or remove it")
            labels = self._labels[torch.from_numpy(batch)].to(self.device, non_blocking=True)
            yield self._normalise(images.to(self.device, non_blocking=True)), labels

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """``(x / 255 - mean) / std`` of uint8 ``[B, 3, H, W]``."""
        return images.float().div_(255).sub_(self._mean).div_(self._std)


class _Decoder(torch.utils.data.Dataset):
    """Decodes and augments one file: uint8 ``[3, S, S]``, or a text that says what is wrong."""

    def __init__(
        self,
        paths: np.ndarray,
        image_size: int,
        augmentation: StreamAugmentation | None,
        key: tuple[int | str, ...],
    ) -> None:
        self._paths = paths
        self._image_size = image_size
        self._transform = augmentation.transform(image_size) if augmentation else self._centre
        self._key = key

    def __getitem__(self, row: int) -> torch.Tensor | str:
        path = os.fsdecode(self._paths[row])
        try:
            with Image.open(path) as image:
                upright = to_rgb(ImageOps.exif_transpose(image))
        # Decoders of broken files raise OSError, SyntaxError, struct.error and many others.
        except Exception as error:
            return f"{path}: not a readable image ({error})"
        seed = int(keyed_generator(*self._key, "image", row).integers(2**63))
        # torchvision draws from torch's global CPU generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return functional.pil_to_tensor(self._transform(upright))

    def _centre(self, image: Image.Image) -> Image.Image:
        scaled = functional.resize(image, round(self._image_size * _EVALUATION_MARGIN))
        return functional.center_crop(scaled, [self._image_size] * 2)


def _collate(images: list[torch.Tensor | str]) -> torch.Tensor | str:
    """uint8 ``[B, 3, S, S]``, or the first text among the images."""
    tensors = [image for image in images if isinstance(image, torch.Tensor)]
    if len(tensors) < len(images):
        return next(image for image in images if isinstance(image, str))
    return torch.stack(tensors)


def _leave_signals(worker: int) -> None:
    """Leaves signals to the main process: Ctrl+C, and what torchrun sends to a process group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
