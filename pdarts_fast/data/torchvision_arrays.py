"""Batches from uint8 images in memory, augmented image by image by torchvision in processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from pdarts_fast.data.base import ImageData
from pdarts_fast.data.loader import ArrayLoader, Batch
from pdarts_fast.data.plan import Augmentation, Plan
from pdarts_fast.data.workers import worker_batches


class TorchvisionLoader(ArrayLoader):
    """Serves images by torchvision's transforms (v2), the way most training programs do.

    Pads, crops, flips, normalises and erases one image after the other, with the choices that all
    loaders share: its batches equal :class:`ResidentLoader`'s bit for bit.

    Args:
        data: the images, on the CPU.
        indices: as for :class:`ArrayLoader`.
        workers: processes that augment; 0 augments in this one.
        options: the other arguments of :class:`ArrayLoader`.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: a worker process failed.
    """

    def __init__(
        self,
        data: ImageData,
        indices: np.ndarray | None = None,
        *,
        workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, indices, **options)
        if data.images.device.type != "cpu":
            raise ValueError(f"{data.name}: images are on {data.images.device}, wanted the CPU")
        self._workers = workers

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        images = _Images(
            self._images,
            self._labels,
            self._draw(epoch),
            self._augmentation,
            (self._mean, self._std),
        )
        batches = [places.tolist() for places in self._places(start)]
        for batch, labels in worker_batches(
            images, batches, workers=self._workers, device=self.device
        ):
            yield (
                batch.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


class _Images(torch.utils.data.Dataset):
    """Image and label at a place of the epoch: float32 ``[3, H, W]`` and int64 ``[]``."""

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        plan: Plan,
        augmentation: Augmentation | None,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        self._images = images
        self._labels = labels
        self._plan = plan
        self._augmentation = augmentation or Augmentation(0, False, 0)
        self._mean, self._std = normalisation

    def __getitem__(self, place: int) -> Batch:
        plan, wanted = self._plan, self._augmentation
        row = int(plan.rows[place])
        image = self._images[row]
        height, width = image.shape[1:]
        if wanted.crop_padding:
            top, left = int(plan.crop_y[place]), int(plan.crop_x[place])
            image = functional.pad(image, [wanted.crop_padding])
            image = functional.crop(image, top, left, height, width)
        if plan.flip[place]:
            image = functional.horizontal_flip(image)
        # Not to_dtype(scale=True): it multiplies by 1/255, which rounds otherwise than ToTensor.
        image = functional.normalize(
            image.to(torch.float32).div_(255), list(self._mean), list(self._std), inplace=True
        )
        if wanted.cutout:
            tops = [int(plan.hole_y[place]), int(plan.hole_x[place])]
            low = [max(0, centre - wanted.cutout // 2) for centre in tops]
            high = [centre - wanted.cutout // 2 + wanted.cutout for centre in tops]
            image = functional.erase(
                image, low[0], low[1], high[0] - low[0], high[1] - low[1], torch.zeros(()), True
            )
        return image, self._labels[row]
