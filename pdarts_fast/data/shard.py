"""Which images of a batch each of several processes shows. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from pdarts_fast.data.loader import Loader

# BatchNorm needs two values a channel, and a last layer may leave one value an image.
SMALLEST_PART = 2


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of several processes shows.

    A batch belongs to all ranks together: each shows an equal, contiguous part of it, so that the
    ranks show the images that one process would, and the number of batches does not depend on the
    number of ranks. Where a batch cannot be divided so, parts of ``SMALLEST_PART`` images or more
    go round it once more: no image is left out, some of its first are shown twice.

    Attributes:
        rank: This process, in 0..world_size - 1.
        world_size: Processes that share each batch.

    Raises:
        ValueError: A number out of range.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {self.rank}")

    def size(self, images: int) -> int:
        """Images that each rank shows of a batch of ``images``."""
        if self.world_size == 1:
            return images
        return max(math.ceil(images / self.world_size), min(images, SMALLEST_PART))

    def own(self, images: int) -> int:
        """How many of this rank's images, its first ones, no rank before it shows."""
        size = self.size(images)
        return max(0, min(size, images - self.rank * size))

    def own_of_batches(self, images: int, batch_size: int) -> list[int]:
        """`own` of every batch of an epoch of so many images."""
        starts = range(0, images, batch_size)
        return [self.own(min(batch_size, images - start)) for start in starts]

    def places(self, first: int, stop: int) -> np.ndarray:
        """This rank's places of the batch that holds places ``first..stop - 1``: int64 ``[n]``."""
        size = self.size(stop - first)
        return (self.rank * size + np.arange(size)) % (stop - first) + first


class WithoutRepeats:
    """A loader's batches, less the images that another rank shows too."""

    def __init__(self, loader: Loader, batch_size: int, shard: Shard) -> None:
        self._loader = loader
        self._batch_size = batch_size
        self._shard = shard

    @property
    def num_images(self) -> int:
        return self._loader.num_images

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches as `Loader` does."""
        counts = self._shard.own_of_batches(self.num_images, self._batch_size)[start:]
        for own, (images, labels) in zip(counts, self._loader.epoch(epoch, start), strict=True):
            yield images[:own], labels[:own]
