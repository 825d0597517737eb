"""Masks of skip dropout, bit for bit those that torch's generator on the CPU draws.

``bernoulli_(p)`` takes two words of the generator's Mersenne twister for each element in its order,
16 ns on one thread. ``csrc/draw.cpp`` takes the same words with vectors, on all threads, and writes
channels-last: 0.5 ns on one thread. Torch does not promise how it draws, so the two are compared
once a process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import abi
from .library import Library

_BLOCK = 624
_STATE = np.dtype(
    [
        ("seed", np.uint64),
        ("left", np.int32),
        ("seeded", np.int32),
        ("next", np.uint64),
        ("words", np.uint64, _BLOCK),
        ("normal", np.uint8, 40),
    ]
)
"""What ``torch.Generator.get_state`` returns for the CPU."""

# Shapes and rates of the comparison: odd sizes, part of a block of words, and more than one.
_TRIALS = (
    ((1, 1, 1, 1), 0.5, torch.float32),
    ((2, 3, 5, 7), 0.3, torch.float32),
    ((3, 16, 4, 4), 0.6000000000000001, torch.bfloat16),
    ((2, 24, 9, 5), 0.9, torch.float32),
)


def draw(
    library: Library,
    kept: Tensor,
    channels: int,
    probabilities: Sequence[float],
    generator: torch.Generator,
) -> None:
    """Draws a mask after another, as ``bernoulli_`` does for ``[N, channels, H, W]``.

    Args:
        library: Draws.
        kept: uint8 ``[masks, N, H, W, C]``, contiguous, written: 1 where an element is kept. The
            channels behind ``channels`` are 0.
        channels: C without padding.
        probabilities: Of keeping an element, by mask, between 0 and 1 exclusively.
        generator: Of the CPU; left as ``bernoulli_`` leaves it.
    """
    if not kept.numel():
        return
    state = generator.get_state()
    fields = state.numpy().view(_STATE)
    words = fields["words"][0].astype(np.uint32)
    used = np.array([_BLOCK + 1 - int(fields["left"][0])], dtype=np.int64)
    thresholds = np.array([math.ceil(p * 2**53) for p in probabilities], dtype=np.uint64)
    masks, images, height, width, padded = kept.shape
    task = abi.DrawTask(
        words=words.ctypes.data,
        used=used.ctypes.data,
        masks=masks,
        images=images,
        channels=channels,
        pixels=height * width,
        threads=torch.get_num_threads(),
        padded=padded,
        thresholds=thresholds.ctypes.data,
        out=kept.data_ptr(),
    )
    library.draw(task)
    fields["words"], fields["next"], fields["left"] = words, used, _BLOCK + 1 - used
    generator.set_state(state)


@lru_cache(maxsize=8)
def agrees(library: Library) -> bool:
    """Whether ``draw`` gives the masks of this torch and leaves its generator in the same state."""
    theirs, ours = torch.Generator(), torch.Generator()
    theirs.manual_seed(1904)
    # An odd number of words: what elements take begins anywhere in a block.
    torch.randint(7, (3,), dtype=torch.int32, generator=theirs)
    ours.set_state(theirs.get_state())
    if ours.get_state().numel() != _STATE.itemsize:
        return False
    for shape, keep, dtype in _TRIALS:
        images, channels, height, width = shape
        wanted = torch.empty(shape, dtype=dtype).bernoulli_(keep, generator=theirs)
        kept = torch.empty((1, images, height, width, channels + 1), dtype=torch.uint8)
        draw(library, kept, channels, [keep], ours)
        found = kept[0, ..., :channels].permute(0, 3, 1, 2)
        if not torch.equal(found.to(dtype), wanted):
            return False
        if not torch.equal(ours.get_state(), theirs.get_state()):
            return False
    return True
