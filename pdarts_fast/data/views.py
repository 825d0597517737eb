"""What an image file becomes: the window that is cut out of it, its mirroring and its colours.

The random choices of an image follow from the seed, the stream, the epoch and the image alone, so
the torchvision and the DALI loader of files cut, mirror and colour alike. No torch.

Source: the distributions are those of torchvision's ``RandomResizedCrop``,
``RandomHorizontalFlip`` and ``ColorJitter``; arXiv 1904.12760, section 4.3; arXiv 1806.09055,
section A.2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pdarts_fast.data.plan import keyed_generator

# Part of the image's area that a crop covers, and its ratio of width to height.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
# Draws of a window that are made before the centre is taken.
TRIES = 10
# An image is evaluated on the centre of a square this much larger: 256 for 224.
EVALUATION_MARGIN = 256 / 224
# The order of these names is the order of StreamAugmentation.jitter.
COLOURS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class StreamAugmentation:
    """What happens to each training image: random resized crop, flip, colour jitter.

    Attributes:
        flip: mirror left to right with probability 1/2.
        jitter: strength of the jitter of brightness, contrast, saturation and hue.
    """

    flip: bool = True
    jitter: tuple[float, ...] = (0.4, 0.4, 0.4, 0.2)


class View(NamedTuple):
    """How an image of known size becomes one of ``S``×``S``; lengths in pixels."""

    box: tuple[int, int, int, int]  # top, left, height, width: what is cut out first
    resized: tuple[int, int]  # height, width it is scaled to
    window: tuple[int, int]  # top, left of the S×S pixels taken from that
    flip: bool
    colours: tuple[float, float, float, float]  # three factors; the turn of the hue
    order: tuple[int, ...]  # order in which torchvision applies the colours


def evaluation_view(height: int, width: int, side: int) -> View:
    """The centre of an image whose shorter side is scaled to ``256 / 224 * side``.

    Source: torchvision's ``Resize`` and ``CenterCrop``, with their rounding.
    """
    short = round(side * EVALUATION_MARGIN)
    scale = min(height, width)
    resized = (int(short * height / scale), int(short * width / scale))
    window = (round((resized[0] - side) / 2), round((resized[1] - side) / 2))
    return View(
        (0, 0, height, width), resized, window, False, (1.0, 1.0, 1.0, 0.0), tuple(range(4))
    )


def training_view(
    height: int,
    width: int,
    side: int,
    augmentation: StreamAugmentation,
    key: tuple[int | str, ...],
    row: int,
) -> View:
    """A random window, mirroring and colouring.

    Args:
        height: of the upright image in pixels.
        width: of the upright image in pixels.
        side: of the result in pixels.
        augmentation: what is wanted.
        key: seed, stream and epoch.
        row: place of the image in its listing.
    """
    generator = keyed_generator(*key, "view", row)
    # All draws are made whatever is wanted and however large the image is: none moves another.
    areas, ratios = generator.random((2, TRIES))
    top, left, mirror = generator.random(3)
    turns = generator.uniform(-1.0, 1.0, size=4)
    order = tuple(int(place) for place in generator.permutation(4))
    strengths = np.array((*augmentation.jitter, 0.0, 0.0, 0.0, 0.0)[:4])
    brightness, contrast, saturation, hue = (strengths * turns).tolist()
    box_height, box_width = _window_size(height, width, areas, ratios)
    found = box_height > 0
    if not found:
        box_height, box_width = _widest_window(height, width)
    spare = (height - box_height, width - box_width)
    corner = (
        (int(top * (spare[0] + 1)), int(left * (spare[1] + 1)))
        if found
        else (spare[0] // 2, spare[1] // 2)
    )
    return View(
        (*corner, box_height, box_width),
        (side, side),
        (0, 0),
        augmentation.flip and bool(mirror < 0.5),
        (1 + brightness, 1 + contrast, 1 + saturation, hue),
        order,
    )


def _window_size(height: int, width: int, areas: np.ndarray, ratios: np.ndarray) -> tuple[int, int]:
    """The first window of random area and ratio that fits; (0, 0) if none does."""
    area = height * width * (AREA[0] + areas * (AREA[1] - AREA[0]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = np.exp(low + ratios * (high - low))
    wide = np.rint(np.sqrt(area * ratio)).astype(int)
    tall = np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (wide > 0) & (tall > 0) & (wide <= width) & (tall <= height)
    if not fits.any():
        return 0, 0
    first = int(fits.argmax())
    return int(tall[first]), int(wide[first])


def _widest_window(height: int, width: int) -> tuple[int, int]:
    """The largest window of an allowed ratio: what torchvision falls back to, at the centre."""
    ratio = width / height
    if ratio < RATIO[0]:
        return round(width / RATIO[0]), width
    if ratio > RATIO[1]:
        return height, round(height * RATIO[1])
    return height, width
