"""The in-memory form of a data set, and deterministic ways to split one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pdarts_fast.errors import RunError, UsageError

TEST_FRACTION = 0.2
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images of one size.

    Attributes:
        name: the data set's name.
        images: uint8 ``[N, 3, H, W]``, contiguous, RGB.
        labels: int64 ``[N]`` in ``[0, len(classes))``, on the same device.
        classes: class names by label.

    Raises:
        ValueError: a tensor of another dtype, shape or device, or a label out of range.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{self.name}: images must be uint8 [N, 3, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if not images.is_contiguous():
            raise ValueError(f"{self.name}: images must be contiguous, got {images.stride()}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name}: labels must be int64 [{len(images)}], one an image, "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if labels.device != images.device:
            raise ValueError(
                f"{self.name}: images are on {images.device} but labels on {labels.device}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(
                f"{self.name}: labels run from {int(labels.min())} to {int(labels.max())}, "
                f"wanted 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set with the training set's normalisation.

    Attributes:
        train: training images, in an order that mixes the classes, so that any contiguous part
            is a fair sample.
        test: test images, with the same classes.
        mean: per-channel mean of the training pixels, in 0..1.
        std: per-channel standard deviation of the training pixels, in 0..1, positive.
    """

    train: ImageData
    test: ImageData
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            raise ValueError(
                f"{self.train.name}: the training set has {len(self.train.classes)} classes and "
                f"the test set {len(self.test.classes)} others: they must be the same"
            )

    @property
    def num_classes(self) -> int:
        return len(self.train.classes)

    def facts(self, name: str) -> dict[str, Any]:
        """What a run's config.json says of its data, under the name given with ``--dataset``."""
        return {
            "name": name,
            "num_classes": self.num_classes,
            "classes": list(self.train.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "image_size": self.train.images.shape[-1],
            "mean": list(self.mean),
            "std": list(self.std),
        }


def split_indices(num_images: int, fraction: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Splits ``0..num_images-1`` by index: the first part trains weights, the second alphas.

    Args:
        num_images: images to split.
        fraction: share of the first part; ``floor(fraction * num_images)`` images go there.

    Returns:
        Two int64 arrays, both non-empty, that together hold every index once.

    Raises:
        UsageError: one part would be empty.

    Source: arXiv 1904.12760, section 4.2 (half of the training set for each).
    """
    first = math.floor(fraction * num_images) if math.isfinite(fraction) else -1
    if not 0 < first < num_images:
        raise UsageError(
            f"splitting {num_images} training images with fraction {fraction:g} leaves one part "
            f"empty: both weights and alphas need images, choose a fraction between 0 and 1"
        )
    return np.arange(first, dtype=np.int64), np.arange(first, num_images, dtype=np.int64)


def hash_order(keys: Sequence[str]) -> list[int]:
    """The order of ``keys`` by their BLAKE2 digest: shuffled, yet the same on every machine."""
    digests = [blake2b(key.encode("utf-8", "surrogateescape")).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)


def stratified_split(
    labels: Sequence[int], keys: Sequence[str], test_fraction: float = TEST_FRACTION
) -> tuple[np.ndarray, np.ndarray]:
    """Takes about ``test_fraction`` of every class away for testing, chosen by a hash of the key.

    The choice depends on the keys alone: not on a seed, the platform or a library's generator.
    A class of at least two images gives at least one to each side, one of a single image stays
    in training.

    Args:
        labels: class of each image.
        keys: a stable, unique name of each image.
        test_fraction: share of the test side, in 0..1.

    Returns:
        Sorted int64 indices ``(train, test)``.
    """
    members: dict[int, list[int]] = {}
    for index in hash_order(keys):
        members.setdefault(labels[index], []).append(index)
    train: list[int] = []
    test: list[int] = []
    for indices in members.values():
        count = len(indices)
        taken = min(max(1, round(test_fraction * count)), count - 1)
        test += indices[:taken]
        train += indices[taken:]
    return np.array(sorted(train), dtype=np.int64), np.array(sorted(test), dtype=np.int64)


def channel_statistics(
    images: torch.Tensor,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel over all pixels, divided by 255.

    Exact: computed in float64 from the histogram of the 256 values.

    Args:
        images: uint8 ``[N, 3, H, W]`` on the CPU, ``N`` at least 1.

    Returns:
        ``(mean, std)``, three numbers in 0..1 each; a constant channel gets std 1.
    """
    histogram = np.zeros((3, 256), dtype=np.int64)
    for chunk in images.split(_CHUNK):
        for channel in range(3):
            values = chunk[:, channel].reshape(-1).numpy()
            histogram[channel] += np.bincount(values, minlength=256)
    levels = np.arange(256) / 255.0
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ levels
    std = np.sqrt((weights * (levels - mean[:, None]) ** 2).sum(axis=1))
    # A constant channel carries nothing: std 1 turns it into zeros instead of 0/0.
    std[(histogram > 0).sum(axis=1) == 1] = 1.0
    return (
        (float(mean[0]), float(mean[1]), float(mean[2])),
        (float(std[0]), float(std[1]), float(std[2])),
    )


def resize_images(images: torch.Tensor, image_size: int) -> torch.Tensor:
    """Resizes square images bilinearly (with antialiasing when they shrink), rounded to uint8.

    Args:
        images: uint8 ``[N, 3, S, S]``.
        image_size: new side in pixels.

    Returns:
        uint8 ``[N, 3, image_size, image_size]``, contiguous; ``images`` itself if it fits.
    """
    side = images.shape[-1]
    if side == image_size:
        return images
    resized = images.new_empty(len(images), 3, image_size, image_size)
    for source, target in zip(images.split(_CHUNK), resized.split(_CHUNK), strict=True):
        target.copy_(
            functional.interpolate(
                source.float(),
                size=(image_size, image_size),
                mode="bilinear",
                align_corners=False,
                antialias=image_size < side,
            )
            .round_()
            .clamp_(0, 255)
        )
    return resized


def require_classes(name: str, where: str, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Raises :class:`RunError` if a class has no image in ``labels``."""
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        missing = classes[int(np.flatnonzero(counts == 0)[0])]
        raise RunError(
            f"{name}: class {missing!r} has no usable image in {where}: add images or remove "
            f"the class's folder"
        )
