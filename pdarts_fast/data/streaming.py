"""Batches read from image files by torchvision in worker processes, for data beyond the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from pdarts_fast.data.files import MEAN as MEAN
from pdarts_fast.data.files import STD as STD
from pdarts_fast.data.files import FileLoader, Views, decode, unreadable
from pdarts_fast.data.files import ImageFiles as ImageFiles
from pdarts_fast.data.files import find_images as find_images
from pdarts_fast.data.image_folder import Listing
from pdarts_fast.data.loader import Batch
from pdarts_fast.data.views import COLOURS, View
from pdarts_fast.data.views import StreamAugmentation as StreamAugmentation
from pdarts_fast.data.workers import worker_batches

_ADJUST = tuple(getattr(functional, f"adjust_{name}") for name in COLOURS)


class StreamingLoader(FileLoader):
    """Serves image files through torchvision's transforms in worker processes.

    Args:
        listing: the files and labels.
        options: the other arguments of :class:`FileLoader`; ``workers`` are processes, 0 decodes
            in this one.

    Raises:
        ValueError: an argument out of range.
        RunError: while iterating: a file cannot be decoded, or a worker process failed.
    """

    def __init__(self, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self._shift, self._scale = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self._mean, self._std)
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        rows = self._rows(epoch, start)
        decoder = _Decoder(self._paths, self._views, (*self._key, epoch))
        made = worker_batches(
            decoder,
            [batch.tolist() for batch in rows],
            workers=self._workers,
            device=self.device,
            collate=_collate,
        )
        for batch, decoded in zip(rows, made, strict=True):
            shown = self._shown(decoded.problems)
            images, labels = decoded.images, self._labels[torch.from_numpy(batch[shown])]
            if len(shown) < len(batch) or any(decoded.problems):
                places = np.cumsum([problem is None for problem in decoded.problems]) - 1
                images = images[torch.from_numpy(places[shown])]
            yield (
                self._normalise(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """``(x / 255 - mean) / std`` of uint8 ``[B, 3, H, W]``."""
        return images.float().div_(255).sub_(self._shift).div_(self._scale)


class _Decoder(torch.utils.data.Dataset):
    """Decodes and augments one file: uint8 ``[3, S, S]``, or a text that says what is wrong."""

    def __init__(self, paths: np.ndarray, views: Views, key: tuple[int | str, ...]) -> None:
        self._paths = paths
        self._views = views
        self._key = key

    def __getitem__(self, row: int) -> torch.Tensor | str:
        path = os.fsdecode(self._paths[row])
        try:
            image = decode(path)
        # Decoders of broken files raise OSError, SyntaxError, struct.error and many others.
        except Exception as error:
            return unreadable(path, error)
        view = self._views.of(image.height, image.width, self._key, row)
        augmentation = self._views.augmentation
        strengths = augmentation.jitter if augmentation else ()
        return functional.pil_to_tensor(apply(view, image, self._views.image_size, strengths))


def apply(
    view: View, image: Image.Image, side: int, strengths: tuple[float, ...] = ()
) -> Image.Image:
    """Cuts, scales, mirrors and colours an upright image by torchvision's operations.

    Args:
        view: the choices.
        image: RGB, of the size the view was made for.
        side: of the result in pixels.
        strengths: of the jitter; a colour of strength 0 is left as it is.
    """
    image = functional.crop(image, *view.box)
    image = functional.resize(image, list(view.resized))
    image = functional.crop(image, *view.window, side, side)
    if view.flip:
        image = functional.horizontal_flip(image)
    for place in view.order:
        if place < len(strengths) and strengths[place]:
            image = _ADJUST[place](image, view.colours[place])
    return image


class _Decoded(NamedTuple):
    """The readable images of a batch, uint8 ``[n, 3, S, S]``, and what is wrong with the others."""

    images: torch.Tensor
    problems: list[str | None]


def _collate(items: list[torch.Tensor | str]) -> _Decoded:
    images = [item for item in items if isinstance(item, torch.Tensor)]
    return _Decoded(
        torch.stack(images) if images else torch.empty(0, dtype=torch.uint8),
        [item if isinstance(item, str) else None for item in items],
    )
