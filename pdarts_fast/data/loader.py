"""Batches from uint8 images that live on the device, augmented by a few operations a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn import functional

from pdarts_fast.data.base import ImageData
from pdarts_fast.data.shard import Shard


@dataclass(frozen=True)
class Augmentation:
    """What happens to each training image, in this order.

    Attributes:
        crop_padding: pixels of black added on every side before a random crop of the old size;
            0 for no crop.
        flip: mirror left to right with probability 1/2.
        cutout: side in pixels of a square set to 0 after normalisation, centred on a uniformly
            random pixel and clipped at the border; 0 for none.

    Raises:
        ValueError: a negative number.
    """

    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, got {getattr(self, name)}")


@runtime_checkable
class Loader(Protocol):
    """What training needs from a loader. Loaders hold no position: resuming is exact."""

    @property
    def num_images(self) -> int:
        """Images in an epoch."""

    def __len__(self) -> int:
        """Batches in an epoch; the last one may be smaller."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields batches ``start``, ``start + 1``, ... of one epoch.

        Args:
            epoch: epoch number, 0-based; each has its own order and augmentation.
            start: first batch to yield.

        Yields:
            images ``[B, 3, H, W]`` in the loader's dtype, normalised, and labels int64 ``[B]``.
            Batch ``i`` is the same whatever ``start`` is.
        """


class _Plan(NamedTuple):
    """The random choices of one epoch, one an image in the order it is shown: each ``[N]``."""

    rows: torch.Tensor  # int64, where the image is stored
    crop_y: torch.Tensor  # int64 in 0..2·crop_padding: top of the crop in the padded image
    crop_x: torch.Tensor
    flip: torch.Tensor  # bool
    hole_y: torch.Tensor  # int64 in 0..H-1: centre of the hole
    hole_x: torch.Tensor


class ResidentLoader:
    """Serves :class:`ImageData` from the device's memory; implements :class:`Loader`.

    Per batch: gather the images, pad, gather the crops (mirrored where the image is flipped),
    ``(x / 255 - mean) / std``, cut the holes. No step loops over images or synchronises with the
    device. Values equal torchvision's ``RandomCrop(padding)``, ``RandomHorizontalFlip``,
    ``ToTensor``, ``Normalize`` bit for bit, given the same random choices.

    The choices of a whole epoch are drawn at once on the CPU (about a millisecond), so every
    device sees the same batches. They depend on ``(seed, stream, epoch)`` and the image's place
    in the epoch only: neither on the batch size nor on where iteration starts.

    Args:
        data: the images. On their own device they are shared, not copied; otherwise the loader
            moves the ones it serves.
        indices: int64 ``[n]``, the images to serve (and their order without ``shuffle``); None
            for all.
        batch_size: images a batch.
        augmentation: None serves images as they are, normalised.
        mean: per-channel mean in 0..1.
        std: per-channel standard deviation in 0..1.
        seed: the run's seed.
        stream: names this loader's purpose, e.g. ``"weights"``: loaders of one seed and different
            streams draw independently.
        shuffle: a new order each epoch.
        device: where images are held and batches appear.
        dtype: of the image batches; normalisation computes in at least float32.
        rank: this process among those that share each batch; see :class:`Shard`.
        world_size: how many they are.

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
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        rows = _check_indices(data, indices)
        self.device = torch.device(device)
        self._rows = rows
        self._images, self._labels = data.images, data.labels
        if self._images.device != torch.empty(0, device=self.device).device:
            if indices is not None:
                picked = torch.from_numpy(rows)
                self._images, self._labels = self._images[picked], self._labels[picked]
                self._rows = np.arange(len(rows), dtype=np.int64)
            self._images = self._images.to(self.device)
            self._labels = self._labels.to(self.device)
        self._batch_size = batch_size
        self._shard = Shard(rank, world_size)
        self._augmentation = augmentation
        self._key = (seed, stream)
        self._shuffle = shuffle
        self._dtype = dtype
        self._compute_dtype = torch.promote_types(dtype, torch.float32)
        self._mean, self._std = (
            torch.tensor(values, dtype=self._compute_dtype, device=self.device).view(1, 3, 1, 1)
            for values in _check_normalisation(mean, std)
        )

    @property
    def num_images(self) -> int:
        return len(self._rows)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self._batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the batches of one epoch from batch ``start`` on; see :class:`Loader`.

        Raises:
            ValueError: ``epoch`` is negative, or ``start`` is not in ``0..len(self)``.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if start == len(self):
            return
        plan = self._plan(epoch)
        for first in range(start * self._batch_size, self.num_images, self._batch_size):
            stop = min(first + self._batch_size, self.num_images)
            places = torch.from_numpy(self._shard.places(first, stop)).to(self.device)
            part = _Plan(*(choices[places] for choices in plan))
            images = self._images.index_select(0, part.rows)
            yield self._prepare(images, part), self._labels.index_select(0, part.rows)

    def _plan(self, epoch: int) -> _Plan:
        """Draws every random choice of an epoch; each kind from a generator of its own."""
        count = self.num_images
        height, width = self._images.shape[2:]
        augmentation = self._augmentation or Augmentation(crop_padding=0, flip=False)

        def generator(purpose: str) -> np.random.Generator:
            return keyed_generator(*self._key, epoch, purpose)

        def below(limit: int, purpose: str, wanted: bool = True) -> np.ndarray:
            if not wanted or limit == 1:
                return np.zeros(count, dtype=np.int64)
            return generator(purpose).integers(limit, size=count, dtype=np.int64)

        crops, holes = 2 * augmentation.crop_padding + 1, augmentation.cutout > 0
        choices = (
            generator("order").permutation(self._rows) if self._shuffle else self._rows,
            below(crops, "crop_y"),
            below(crops, "crop_x"),
            below(2, "flip", augmentation.flip).astype(bool),
            below(height, "cutout_y", holes),
            below(width, "cutout_x", holes),
        )
        return _Plan(*(torch.from_numpy(choice).to(self.device) for choice in choices))

    def _prepare(self, images: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """Augments and normalises uint8 ``[B, 3, H, W]``."""
        augmentation = self._augmentation
        if augmentation is not None and (augmentation.crop_padding or augmentation.flip):
            images = _crop_and_flip(images, plan, augmentation.crop_padding)
        batch = images.to(self._compute_dtype).div_(255).sub_(self._mean).div_(self._std)
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


def keyed_generator(*parts: int | str) -> np.random.Generator:
    """A generator keyed by a digest of ``parts``: stable between processes and platforms."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


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
