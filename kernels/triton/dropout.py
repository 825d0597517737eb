"""The dropout of skips inside a kernel: the mask that ``kernels/philox.py`` specifies."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factor(
    rate_ptr, state_ptr, stream, pixel, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr
):
    """0 or ``1 / (1 - rate)`` of every element, fp32 [BLOCK_P, BLOCK_C].

    Args:
        rate_ptr, state_ptr: fp32 [1]; seed and step, int64 [2].
        pixel: Number of every pixel in the batch, [BLOCK_P].
        CHANNELS: Without padding: the stream counts elements. If they are a multiple of 4, four
            neighbours share a counter.
    """
    rate = tl.load(rate_ptr)
    seed = tl.load(state_ptr)
    step = (tl.load(state_ptr + 1) & 0xFFFFFFFF).to(tl.uint32)
    third = stream.to(tl.uint32)
    wide = pixel.to(tl.int64)
    if CHANNELS % 4 == 0:
        block = wide[:, None] * (CHANNELS // 4) + tl.arange(0, BLOCK_C // 4)[None, :]
        low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, low, high, third, step)
        pairs = tl.join(tl.join(r0, r2), tl.join(r1, r3))
        r = tl.reshape(pairs, [pixel.shape[0], BLOCK_C])
    else:
        element = wide[:, None] * CHANNELS + tl.arange(0, BLOCK_C)[None, :]
        block = element >> 2
        word = element & 3
        low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, low, high, third, step)
        r = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    u = (r >> 8).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(u >= rate, 1.0 / (1.0 - rate), 0.0)
