"""Counter-based random numbers of the skip dropout: Philox4x32-10 in plain torch.

Every backend draws the same mask, in any order and without state of its own: a mask element is a
function of (seed, step, stream, element index) alone. This file is the specification.

For element ``e`` of a tensor in NHWC order, ``e = ((n * H + h) * W + w) * C + c``:

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (block low, block high, stream, step low 32 bits),   block = e // 4
    r       = philox4x32_10(counter, key)[e % 4]
    u       = (r >> 8) * 2**-24                                    exact in float32
    keep    = u >= p;  a kept value is multiplied by 1 / (1 - p)   p in float32

Words are 32-bit unsigned numbers held in int64, and no intermediate leaves the int64 range.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, and the known-answer
vectors of its Random123 library.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_WORD = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``multiplier * word``; in 16-bit halves, so that int64 suffices."""
    upper = word * (multiplier >> 16)
    lower = word * (multiplier & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & 0xFFFF) << 16)) & _WORD
    return high, low


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of every counter.

    Args:
        counter: Four words, int64 in 0..2**32-1, of shapes that broadcast.
        key: Two words, int64 in 0..2**32-1, of shapes that broadcast with the counter.

    Returns:
        Four words, int64 in 0..2**32-1, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mul_hi_lo(MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform(state: Tensor, stream: int, numel: int) -> Tensor:
    """The first ``numel`` uniform numbers of a stream.

    Args:
        state: Seed and step, int64 ``[2]``.
        stream: Which sequence, 0..2**32-1; ``cell index * 64 + edge index`` in a supernet.
        numel: How many numbers.

    Returns:
        float32 ``[numel]`` in 0 <= u < 1, on the device of ``state``.
    """
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=state.device)
    seed, step = state[0], state[1]
    counter = (block & _WORD, block >> 32, torch.full_like(step, stream), step & _WORD)
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    return (torch.stack(words, dim=1).flatten()[:numel] >> 8).to(torch.float32) * 2.0**-24


def keep_mask(p: Tensor, state: Tensor, stream: int, shape: torch.Size) -> Tensor:
    """Which elements survive a dropout of rate ``p``.

    Args:
        p: Dropout rate, float32 ``[1]``.
        state: Seed and step, int64 ``[2]``.
        stream: Which sequence, 0..2**32-1.
        shape: ``(N, C, H, W)`` of the tensor to mask.

    Returns:
        bool ``[N, C, H, W]``, channels-last in memory.
    """
    batch, channels, height, width = shape
    u = uniform(state, stream, batch * channels * height * width)
    return (u >= p).view(batch, height, width, channels).permute(0, 3, 1, 2)


def dropout(x: Tensor, p: Tensor, state: Tensor, stream: int) -> Tensor:
    """``x * keep / (1 - p)``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype and memory layout.
        p: Dropout rate, float32 ``[1]``, 0 <= p < 1.
        state: Seed and step, int64 ``[2]``.
        stream: Which sequence, 0..2**32-1.

    Returns:
        Same shape and dtype as ``x``.
    """
    keep = keep_mask(p, state, stream, x.shape)
    return x * (keep / (1 - p)).to(x.dtype)
