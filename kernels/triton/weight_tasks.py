"""How the weight gradients of a call's items are divided into programs of ``weight_gradient``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .. import plan
from ..calls import Item
from ..interface import Arrays
from . import common
from .common import block_channels

_PROGRAMS = 512


@dataclass(frozen=True)
class Product:
    """An item whose weight gradients are wanted.

    Attributes:
        number: Its row of coefficients.
        slot, node, half: As in ``calls.Item``.
        input: Row of the stack of inputs that it reads.
        kernel, dilation, pad: Of the depthwise convolution; 1 or 2, 1, 0 without one.
        taps: How many; the place of tap t in its kernel is ``t * spread``.
        depthwise, pointwise: Offsets into the flat weights, -1 for none.
    """

    number: int
    slot: int
    node: int
    half: int
    input: int
    kernel: int
    dilation: int
    pad: int
    taps: int
    spread: int
    depthwise: int
    pointwise: int


def product(item: Item, number: int, source: int, offsets: list[int]) -> Product:
    """What ``weight_gradients`` wants to know of an item with weights that reads row ``source``.

    A factorized reduce has taps (0, 0) and (1, 1): places 0 and 3 of a 2x2 kernel.

    Args:
        number: Row of coefficients.
    """
    kernel, dilation, pad, taps, spread = item.kernel, item.dilation, item.padding, 0, 1
    if item.kind == plan.CONV:
        taps = kernel * kernel
    elif item.kind == plan.FACTORIZED:
        kernel, dilation, pad, taps, spread = 2, 1, 0, 2, 3
    else:
        kernel, dilation, pad, taps = 1, 1, 0, 1
    depthwise = offsets[item.depthwise] if item.depthwise >= 0 else -1
    where = (number, item.slot, item.node, item.half if item.input < 0 else -1, source)
    geometry = (kernel, dilation, pad, taps, spread)
    return Product(*where, *geometry, depthwise, offsets[item.pointwise])


@dataclass(frozen=True)
class Settings:
    """Tile of the products: ``[block_k, block_p] x [block_p, block_n]``, and warps.

    In half precision 256 rows of 8 warps: dy, which every block of rows computes anew, is half of
    what 128 rows of 4 warps spend on it, and fewer rows are empty. With 32 columns they spill 48
    bytes on sm_80, which takes 128 rows, of 8 warps then. float32, whose operands are split in two,
    takes a quarter of the tile to stay within 128 registers.
    """

    block_k: int
    block_p: int
    block_n: int
    warps: int


def settings(element: int, channels: int, *, large: bool, ampere: bool) -> Settings:
    """Tile of a task.

    Args:
        element: Bytes of a stored element.
        channels: C.
        large: Whether an item has more than 128 rows: taps times input channels.
        ampere: Whether the GPU is older than sm_90.
    """
    block = block_channels(channels)
    if common.INTERPRETED:
        return Settings(512, 512, block, 4)
    if element == 4:
        return Settings(64, 32, 16, 4)
    if large and not ampere:
        return Settings(256, 64, min(block, 32), 8)
    return Settings(128, 64, 16, 4) if block == 16 else Settings(128, 64, 32, 8)


@lru_cache(maxsize=1024)
def product_rows(products: tuple[Product, ...], width: int, block_k: int) -> list[list[int]]:
    """Rows of the first kernel: taps and input channels of every item in blocks."""
    block = min(block_channels(width), block_k)
    rows, base = [], 0
    for item in products:
        for tap in range(0, item.taps, block_k // block):
            for channel in range(0, width, block):
                rows.append([
                    item.number, item.slot, item.node, item.half, item.input, item.kernel,
                    item.dilation, item.pad, tap, item.taps, channel,
                    base + tap * width + channel, item.spread,
                ])  # fmt: skip
        base += item.taps * width
    return rows


def division(rows: int, images: int, pixels: int, block_p: int) -> tuple[int, int]:
    """Parts that the pixels of an image are divided in, and images a program goes through."""
    tiles = triton.cdiv(pixels, block_p)
    shares = min(images, triton.cdiv(_PROGRAMS, rows * tiles))
    return tiles, triton.cdiv(images, shares)


@dataclass(frozen=True)
class Task:
    """Items of a call that read arrays of one shape, and their partial Q.

    Attributes:
        products: The items; the same for every task of the call.
        inputs: What they read, ``[n, N, H, W, Cx]``.
        coef: float32 ``[rows, 3, C]``.
        rectified: Whether the inputs have been through the ReLU.
        settings: Tile.
        rows: Rows of the kernel.
        image_tiles, chunk: Parts that an image is divided in; images of a program.
    """

    products: tuple[Product, ...]
    inputs: Tensor
    coef: Tensor
    rectified: bool
    settings: Settings
    rows: list[list[int]]
    image_tiles: int
    chunk: int

    @property
    def parts(self) -> int:
        """Of every Q."""
        return self.image_tiles * triton.cdiv(self.inputs.shape[1], self.chunk)

    @property
    def vectors(self) -> int:
        """Rows of C partial sums."""
        return sum(item.taps for item in self.products) * self.inputs.shape[-1] * self.parts

    def contraction(self, begin: int, channels: int, half: int) -> list[list[int]]:
        """Rows of the second kernel, for partial sums that begin at vector ``begin``."""
        found, width = [], self.inputs.shape[-1]
        for item in self.products:
            kind = [int(item.depthwise >= 0), max(item.depthwise, 0), item.pointwise]
            split = half if item.spread == 3 else channels
            found.append([begin, item.taps, *kind, width, self.parts, split])
            begin += item.taps * width * self.parts
        return found


def make_task(
    arrays: Arrays,
    products: tuple[Product, ...],
    inputs: Tensor,
    coef: Tensor,
    *,
    rectified: bool,
) -> Task:
    """Divides the work of some items; arguments as the attributes of ``Task``."""
    width = inputs.shape[-1]
    largest = max(item.taps for item in products) * block_channels(width)
    ampere = inputs.is_cuda and torch.cuda.get_device_capability(inputs.device)[0] < 9
    chosen = settings(inputs.element_size(), coef.shape[-1], large=largest > 128, ampere=ampere)
    rows = product_rows(products, width, chosen.block_k)
    pixels = arrays.y.shape[2] * arrays.y.shape[3]
    tiles, chunk = division(len(rows), inputs.shape[1], pixels, chosen.block_p)
    return Task(products, inputs, coef, rectified, chosen, rows, tiles, chunk)
