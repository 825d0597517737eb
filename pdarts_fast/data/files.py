"""Image files read as they are needed: which ones there are, and what their loaders share."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from pdarts_fast.data.image_folder import Listing, list_images, to_rgb
from pdarts_fast.data.loader import Batch
from pdarts_fast.data.plan import BatchedLoader, Shard, draw_order
from pdarts_fast.data.views import StreamAugmentation, View, evaluation_view, training_view
from pdarts_fast.errors import RunError, UsageError

log = logging.getLogger(__name__)

# Mean and standard deviation of the ImageNet training images, as published and commonly used.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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


class FileLoader(BatchedLoader[Batch]):
    """Base of the loaders that read image files; implements ``Loader``.

    The random choices of an image depend on ``(seed, stream, epoch)`` and the image only.

    Args:
        listing: the files and labels.
        batch_size: images a batch, over all ranks.
        image_size: side of the images in pixels.
        augmentation: None serves the centre of each image, as for evaluation: its shorter side is
            scaled to ``256 / 224 * image_size``.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        seed: the run's seed.
        stream: names this loader's purpose; loaders of different streams draw independently.
        shuffle: a new order each epoch.
        device: where batches appear.
        workers: processes or threads that read and decode.
        skip_broken: leave files that cannot be decoded out, with a warning. In a training batch
            another image of the batch takes the place, so that batches keep their size; an
            evaluation batch gets smaller.
        rank: this process among those that share each batch; see :class:`Shard`.
        world_size: how many share it.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: a file cannot be decoded, and ``skip_broken`` is off.
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
        skip_broken: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(listing.files):
            raise ValueError(f"{listing.where}: a loader needs at least one image, got none")
        super().__init__(len(listing.files), batch_size, Shard(rank, world_size))
        self._where = listing.where
        # One array instead of a list: workers would copy a list bit by bit (reference counts).
        self._paths = np.array([os.fsencode(path) for path in listing.files])
        self._labels = torch.from_numpy(listing.labels)
        self._views = Views(image_size, augmentation)
        self._key = (seed, stream)
        self._shuffle = shuffle
        self._workers = workers
        self._skip_broken = skip_broken
        self._reported: set[str] = set()
        self.device = torch.device(device)
        self._mean, self._std = tuple(mean), tuple(std)

    def _rows(self, epoch: int, start: int) -> list[np.ndarray]:
        """The images of each batch from batch ``start`` on: int64 ``[B]`` each."""
        order = draw_order(self._key, epoch, np.arange(self._count), self._shuffle)
        return [order[places] for places in self._places(start)]

    def _shown(self, problems: Sequence[str | None]) -> list[int]:
        """Which images of a batch to show, given what is wrong with each.

        Raises:
            RunError: a broken image that is not to be skipped, or no readable one.
        """
        broken = [problem for problem in problems if problem is not None]
        if broken and not self._skip_broken:
            raise RunError(f"{broken[0]}: replace or remove it, or leave it out with --skip-broken")
        for problem in broken:
            if problem not in self._reported:
                self._reported.add(problem)
                log.warning("%s: skipped", problem)
        kept = [place for place, problem in enumerate(problems) if problem is None]
        if not kept:
            raise RunError(
                f"{self._where}: none of the {len(problems)} images of a batch is readable"
            )
        if self._views.augmentation is None:
            return kept
        return [
            place if problem is None else kept[place % len(kept)]
            for place, problem in enumerate(problems)
        ]


@dataclass(frozen=True)
class Views:
    """How images become ``image_size``×``image_size``, see :class:`View`."""

    image_size: int
    augmentation: StreamAugmentation | None

    def of(self, height: int, width: int, key: tuple[int | str, ...], row: int) -> View:
        """The view of an upright image of some size in pixels."""
        if self.augmentation is None:
            return evaluation_view(height, width, self.image_size)
        return training_view(height, width, self.image_size, self.augmentation, key, row)


def decode(file: str | BinaryIO) -> Image.Image:
    """The upright RGB image in a file."""
    with Image.open(file) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def unreadable(path: str, error: BaseException) -> str:
    """What is wrong with a file that a decoder refused."""
    known = isinstance(error, UnidentifiedImageError)
    reason = "no known format" if known else " ".join(str(error).split())
    return f"{path}: not a readable image ({reason})"
