"""The 1,797 handwritten digits that scikit-learn bundles: a data set that needs no download."""

from __future__ import annotations

import torch

from pdarts_fast.data.base import (
    Dataset,
    ImageData,
    channel_statistics,
    resize_images,
    stratified_split,
)
from pdarts_fast.data.memory import require_memory

NUM_CLASSES = 10
_MAX_PIXEL = 16


def load_digits(image_size: int) -> Dataset:
    """Loads the digits as RGB, with a fixed stratified split of about 80/20.

    Args:
        image_size: side in pixels the 8×8 originals are resized to (bilinear).

    Returns:
        The data set; mean and std come from its training images. The split is the same for
        every run, whatever its seed, and both parts keep the original (mixed) order.

    Raises:
        RunError: the resized images do not fit in memory.

    Source: scikit-learn ``load_digits`` (UCI, Optical Recognition of Handwritten Digits).
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    labels = [int(label) for label in bunch.target]
    require_memory("digits", len(labels), image_size)
    grey = torch.from_numpy(bunch.images).mul(255 / _MAX_PIXEL).round().to(torch.uint8)
    images = resize_images(grey[:, None].expand(-1, 3, -1, -1).contiguous(), image_size)
    classes = tuple(str(digit) for digit in range(NUM_CLASSES))
    train, test = (
        ImageData("digits", images[rows], torch.tensor(labels)[rows], classes)
        for rows in map(torch.from_numpy, stratified_split(labels, [*map(str, range(len(labels)))]))
    )
    mean, std = channel_statistics(train.images)
    return Dataset(train, test, mean, std)
