"""Batches from uint8 images in memory: what their loaders share, and the resident one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch.nn import functional

from pdarts_fast.data.base import ImageData
from pdarts_fast.data.plan import (
    Augmentation,
    BatchedLoader,
    Plan,
    Shard,
    draw_plan,
)

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
_ALL = slice(None)


@runtime_checkable
class Loader(Protocol):
    """What training needs from a loader. Loaders hold no position: resuming is exact."""

    @property
    def num_images(self) -> int:
        """Images in an epoch, over all ranks."""

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank; the last one may be smaller."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields batches ``start``, ``start + 1``, ... of one epoch.

        Args:
            epoch: epoch number, 0-based; each has its own order and augmentation.
            start: first batch to yield.

        Yields:
            images ``[B, 3, H, W]`` in the loader's dtype, normalised, and labels int64 ``[B]``.
            Batch ``i`` is the same whatever ``start`` is.
        """


class ArrayLoader(BatchedLoader[Batch]):
    """Base of the loaders that serve :class:`ImageData`; implements :class:`Loader`.

    The choices of a whole epoch are drawn at once on the CPU (about a millisecond). They depend on
    ``(seed, stream, epoch)`` and the image's place in the epoch only: neither on the loader, the
    device, the batch size, the number of ranks nor on where iteration starts.

    Args:
        data: the images.
        indices: int64 ``[n]``, the images to serve (and their order without ``shuffle``); None
            for all.
        batch_size: images a batch, over all ranks.
        augmentation: None serves images as they are, normalised.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        seed: the run's seed.
        stream: names this loader's purpose, e.g. ``"weights"``: loaders of one seed and different
            streams draw independently.
        shuffle: a new order each epoch.
        device: where batches appear.
        rank: this process among those that share each batch; see :class:`Shard`.
        world_size: how many share it.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        data: ImageData,
        indices: np.ndarray | None = None,
        *,
        batch_size: int,
        augmentation: Augmentation | None,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        stream: str,
        shuffle: bool,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows = _check_indices(data, indices)
        super().__init__(len(self._rows), batch_size, Shard(rank, world_size))
        self.device = torch.device(device)
        self._images, self._labels = data.images, data.labels
        self._augmentation = augmentation
        self._key = (seed, stream)
        self._shuffle = shuffle
        self._mean, self._std = _check_normalisation(mean, std)

    def _draw(self, epoch: int) -> Plan:
        height, width = self._images.shape[2:]
        return draw_plan(
            self._key, epoch, self._rows, (height, width), self._augmentation, self._shuffle
        )


class _Plan(NamedTuple):
    """A :class:`Plan` as tensors on the loader's device."""

    rows: torch.Tensor
    crop_y: torch.Tensor
    crop_x: torch.Tensor
    flip: torch.Tensor
    hole_y: torch.Tensor
    hole_x: torch.Tensor


class ResidentLoader(ArrayLoader):
    """Serves images from the device's memory, a few operations a batch.

    Per batch: gather the images, pad, gather the crops (mirrored where the image is flipped),
    ``(x / 255 - mean) / std``, cut the holes. No step loops over images or synchronises with the
    device. Values equal torchvision's ``RandomCrop(padding)``, ``RandomHorizontalFlip``,
    ``ToTensor``, ``Normalize`` bit for bit, given the same random choices.

    Args:
        data: the images. On their own device they are shared, not copied; otherwise the loader
            moves the ones it serves.
        indices: as for :class:`ArrayLoader`.
        dtype: of the image batches; normalisation computes in at least float32.
        options: the other arguments of :class:`ArrayLoader`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        data: ImageData,
        indices: np.ndarray | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__(data, indices, **options)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        if self._images.device != torch.empty(0, device=self.device).device:
            if indices is not None:
                picked = torch.from_numpy(self._rows)
                self._images, self._labels = self._images[picked], self._labels[picked]
                self._rows = np.arange(len(self._rows), dtype=np.int64)
            self._images = self._images.to(self.device)
            self._labels = self._labels.to(self.device)
        self._dtype = dtype
        compute = torch.promote_types(dtype, torch.float32)
        # All three on the device: CUDA would replace a division by a number of the host by a
        # multiplication with its reciprocal, which rounds otherwise.
        self._levels, self._shift, self._scale = (
            torch.tensor(values, dtype=compute, device=self.device).view(1, -1, 1, 1)
            for values in ((255.0,), self._mean, self._std)
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        places = self._places(start)
        if not places:
            return
        plan = self._plan(epoch, np.concatenate(places))
        sizes = [len(part) for part in places]
        for choices in zip(*(choices.split(sizes) for choices in plan), strict=True):
            part = _Plan(*choices)
            images = self._images.index_select(0, part.rows)
            yield self._prepare(images, part), self._labels.index_select(0, part.rows)

    def _plan(self, epoch: int, places: np.ndarray | slice = _ALL) -> _Plan:
        plan = self._draw(epoch).take(places)
        return _Plan(*(torch.from_numpy(choices).to(self.device) for choices in plan))

    def _prepare(self, images: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Augments and normalises uint8 ``[B, 3, H, W]``."""
        augmentation = self._augmentation
        if augmentation is not None and (augmentation.crop_padding or augmentation.flip):
            images = _crop_and_flip(images, plan, augmentation.crop_padding)
        batch = images.to(self._scale.dtype).div_(self._levels).sub_(self._shift)
        batch.div_(self._scale)
        if augmentation is not None and augmentation.cutout:
            _cut_holes(batch, plan, augmentation.cutout)
        return batch.to(self._dtype)


def _crop_and_flip(images: torch.Tensor, plan: _Plan, padding: int) -> torch.Tensor:
    """Crops uint8 ``[B, 3, H, W]`` at ``plan.crop_*`` of the padded image, then mirrors.

    One gather does both: a mirrored image reads its columns backwards.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4) if padding else images
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = plan.crop_y[:, None] + y  # [B, H]
    columns = plan.crop_x[:, None] + torch.where(plan.flip[:, None], x.flip(0), x)  # [B, W]
    places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # [B, H, W]
    places = places.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(images.shape)


def _cut_holes(batch: torch.Tensor, plan: _Plan, side: int) -> None:
    """Zeroes, in place, ``[c - side // 2, c - side // 2 + side)`` around each centre, clipped."""
    inside = []
    for centre, size in ((plan.hole_y, batch.shape[2]), (plan.hole_x, batch.shape[3])):
        offset = torch.arange(size, device=batch.device) - (centre[:, None] - side // 2)
        inside.append((offset >= 0) & (offset < side))  # [B, size]
    batch.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def _check_indices(data: ImageData, indices: np.ndarray | None) -> np.ndarray:
    """Returns the images to serve as an int64 array of its own."""
    if indices is None:
        rows = np.arange(len(data), dtype=np.int64)
    else:
        given = np.asarray(indices)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ValueError(
                f"indices must be a one-dimensional integer array, "
                f"got {given.dtype} {list(given.shape)}"
            )
        rows = given.astype(np.int64)
    if not len(rows):
        raise ValueError(f"{data.name}: a loader needs at least one image, got none")
    if rows.min() < 0 or rows.max() >= len(data):
        raise ValueError(
            f"indices run from {rows.min()} to {rows.max()}, {data.name} has {len(data)} images"
        )
    return rows


def _check_normalisation(
    mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be 3 finite numbers, one a channel, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")
    return tuple(mean), tuple(std)
