"""Which images a batch holds and what happens to each: the choices that all loaders share.

Every random number of a batch is drawn here, by counter-based generators keyed by the seed, the
stream, the epoch and a purpose. A loader only carries the choices out: so resident, DALI and
torchvision serve the same images, and a batch is the same wherever iteration starts. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from pdarts_fast.data.shard import Shard as Shard

B = TypeVar("B")


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


NO_AUGMENTATION = Augmentation(crop_padding=0, flip=False)


class Plan(NamedTuple):
    """The random choices for some images of an array, one an image: each ``[N]``."""

    rows: np.ndarray  # int64, where the image is stored
    crop_y: np.ndarray  # int64 in 0..2·crop_padding: top of the crop in the padded image
    crop_x: np.ndarray
    flip: np.ndarray  # bool
    hole_y: np.ndarray  # int64 in 0..H-1: centre of the hole
    hole_x: np.ndarray

    def take(self, places: np.ndarray | slice) -> Plan:
        """The choices at some places."""
        return Plan(*(choices[places] for choices in self))


def keyed_generator(*parts: int | str) -> np.random.Generator:
    """A generator keyed by a digest of ``parts``: stable between processes and platforms."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw_order(key: tuple[int, str], epoch: int, rows: np.ndarray, shuffle: bool) -> np.ndarray:
    """The order in which an epoch shows ``rows``.

    Args:
        key: seed and stream.
        epoch: epoch number.
        rows: int64 ``[N]``.
        shuffle: a new order each epoch; else ``rows`` as they are.
    """
    return keyed_generator(*key, epoch, "order").permutation(rows) if shuffle else rows


def draw_plan(
    key: tuple[int, str],
    epoch: int,
    rows: np.ndarray,
    size: tuple[int, int],
    augmentation: Augmentation | None,
    shuffle: bool,
) -> Plan:
    """Draws every random choice of an epoch; each kind from a generator of its own.

    Args:
        key: seed and stream.
        epoch: epoch number.
        rows: int64 ``[N]``, the images to show.
        size: height and width of the images in pixels.
        augmentation: None for none.
        shuffle: a new order each epoch.
    """
    count = len(rows)
    wanted = augmentation or NO_AUGMENTATION

    def below(limit: int, purpose: str, wanted: bool = True) -> np.ndarray:
        if not wanted or limit == 1:
            return np.zeros(count, dtype=np.int64)
        return keyed_generator(*key, epoch, purpose).integers(limit, size=count, dtype=np.int64)

    crops, holes = 2 * wanted.crop_padding + 1, wanted.cutout > 0
    return Plan(
        draw_order(key, epoch, rows, shuffle),
        below(crops, "crop_y"),
        below(crops, "crop_x"),
        below(2, "flip", wanted.flip).astype(bool),
        below(size[0], "cutout_y", holes),
        below(size[1], "cutout_x", holes),
    )


class BatchedLoader(Generic[B]):
    """The arithmetic of epochs and batches that loaders share; see ``Loader``.

    Args:
        count: images of an epoch, over all ranks.
        batch_size: images a batch, over all ranks.
        shard: the part of each batch that this process shows; None for all of it.

    Raises:
        ValueError: ``batch_size`` or ``count`` is below 1.
    """

    def __init__(self, count: int, batch_size: int, shard: Shard | None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if count < 1:
            raise ValueError("a loader needs at least one image, got none")
        self._count = count
        self._batch_size = batch_size
        self._shard = shard or Shard()

    @property
    def num_images(self) -> int:
        """Images of an epoch, over all ranks, without repeats."""
        return self._count

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return math.ceil(self._count / self._batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[B]:
        """Yields the batches of one epoch from batch ``start`` on; see ``Loader``.

        Raises:
            ValueError: ``epoch`` is negative, or ``start`` is not in ``0..len(self)``.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be between 0 and {len(self)} batches, got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[B]:
        raise NotImplementedError

    def _places(self, start: int) -> list[np.ndarray]:
        """This rank's places in the epoch, one int64 array a batch from batch ``start`` on."""
        return [
            self._shard.places(first, min(first + self._batch_size, self._count))
            for first in range(start * self._batch_size, self._count, self._batch_size)
        ]
