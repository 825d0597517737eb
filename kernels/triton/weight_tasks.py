"""How the weight gradients of a call's items are divided into programs of ``weight_gradient``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .. import plan
from ..calls import Item
from ..interface import Arrays
from . import common
from .common import block_channels, pixel_stride
from .gradient_rows import MAX_NODES

# The interpreter pays for every program, a GPU wants many.
_PROGRAMS = 16 if common.INTERPRETED else 512

# What the items of a task read: rows of a stack of the outputs' shape, of larger states, or from
# INPUT on the inputs of the cell.
STACK, LARGE, INPUT = range(3)


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


def settings(
    element: int, channels: int, *, large: bool, ampere: bool, pixels: int = 512
) -> Settings:
    """Tile of a task.

    Args:
        element: Bytes of a stored element.
        channels: C.
        large: Whether an item has more than 128 rows: taps times input channels.
        ampere: Whether the GPU is older than sm_90.
        pixels: Of the largest output, for the interpreter.
    """
    block = block_channels(channels)
    if common.INTERPRETED:
        return Settings(512, max(16, min(512, triton.next_power_of_2(pixels))), block, 4)
    if element == 4:
        return Settings(64, 32, 16, 4)
    if large and not ampere:
        return Settings(256, 64, min(block, 32), 8)
    return Settings(128, 64, 16, 4) if block == 16 else Settings(128, 64, 32, 8)


@dataclass(frozen=True)
class Task:
    """Items whose weight gradients are wanted and that read arrays of one shape.

    Attributes:
        products: The items.
        source: Which arrays they read: ``STACK``, ``LARGE``, or ``INPUT`` plus that of the cell.
        shape: ``[N, H, W, Cx]`` of what they read.
        pixel: Elements from one of its pixels to the next.
        size: Height and width of what they make.
        rectified: Whether what they read has been through the ReLU.
    """

    products: tuple[Product, ...]
    source: int
    shape: tuple[int, ...]
    pixel: int
    size: tuple[int, int]
    rectified: bool


@dataclass(frozen=True, eq=False)
class Division:
    """The tasks of a launch, divided into programs; one object for the same tasks.

    Attributes:
        settings: Tile.
        programs, heads: Tables of ``weight_products``: a row a program, and a row a task. Several
            numbers share a word (``_word``), or loading them would be much of what it loads.
        chunk: Images that a program goes through.
        contraction: Table of ``weight_gradients``.
        vectors: Rows of C partial sums.
        iterations, raw: Tiles that all programs go through, and those that they rectify; for the
            time model.
        width: Of the widest inputs.
        parts: Most partial sums of a Q.
    """

    settings: Settings
    programs: list[list[int]]
    heads: list[list[int]]
    contraction: list[list[int]]
    chunk: int
    vectors: int
    iterations: int
    raw: int
    width: int
    parts: int


def _word(*fields: tuple[int, int]) -> int:
    """Numbers with their bits, from the lowest bits on, as the kernel takes them apart.

    Raises:
        ValueError: One does not fit.
    """
    word, place = 0, 0
    for value, bits in fields:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"weight gradients: {value} does not fit {bits} bits of a table")
        word |= value << place
        place += bits
    return word


@dataclass(frozen=True)
class _Row:
    """``block_k`` pairs of tap and input channel of an item, in groups of ``block``.

    Groups are taps from ``tap`` on, or with ``blocks`` blocks of channels from ``channel`` on.
    Attribute ``vector``: the row's first one in the Q of its task.
    """

    item: Product
    tap: int
    limit: int
    channel: int
    vector: int
    blocks: bool

    def words(self, task: int, tile: int, image: int, base: int) -> list[int]:
        """The row of the kernel's table for a tile of images from ``image`` on."""
        item = self.item
        gradient = item.node if item.half < 0 else MAX_NODES + item.half
        return [
            _word((item.number, 10), (item.slot, 10), (item.input, 10)),
            _word(
                (item.kernel, 4), (item.dilation, 4), (item.pad, 4), (item.spread, 4),
                (self.tap, 6), (self.limit, 6), (int(self.blocks), 1),
            ),
            _word((gradient, 12), (task, 4), (self.channel // 16, 12)),
            base,
            _word((tile, 15), (image, 16)),
        ]  # fmt: skip


def _rows(products: tuple[Product, ...], width: int, block: int, block_k: int) -> list[_Row]:
    """The rows of a task's items."""
    rows, base = [], 0
    for item in products:
        if width > block:
            rows += [
                _Row(item, tap, tap + 1, channel, base + tap * width + channel, True)
                for tap in range(item.taps)
                for channel in range(0, width, block_k)
            ]
        else:
            rows += [
                _Row(item, tap, item.taps, 0, base + tap * width, False)
                for tap in range(0, item.taps, block_k // block)
            ]
        base += item.taps * width
    return rows


@lru_cache(maxsize=1024)
def divide(
    tasks: tuple[Task, ...], channels: int, half: int, element: int, ampere: bool
) -> Division:
    """Divides the work of some tasks into programs of about the same length.

    Args:
        channels: C.
        half: Channels of the first half of a factorized reduce.
        element: Bytes of a stored element.
        ampere: Whether the GPU is older than sm_90.
    """
    block = block_channels(channels)
    largest = max(item.taps * min(t.shape[-1], block) for t in tasks for item in t.products)
    pixels = max(t.size[0] * t.size[1] for t in tasks)
    chosen = settings(element, channels, large=largest > 128, ampere=ampere, pixels=pixels)
    block = min(block, chosen.block_k)
    rows = [_rows(t.products, t.shape[-1], block, chosen.block_k) for t in tasks]
    tiles = [triton.cdiv(t.size[0] * t.size[1], chosen.block_p) for t in tasks]
    images = tasks[0].shape[0]
    units = sum(len(ours) * n for ours, n in zip(rows, tiles, strict=True))
    chunk = triton.cdiv(images, min(images, triton.cdiv(_PROGRAMS, units)))
    programs: list[list[int]] = []
    raw = 0
    heads: list[list[int]] = []
    contraction: list[list[int]] = []
    begin = 0
    for number, (task, ours, n) in enumerate(zip(tasks, rows, tiles, strict=True)):
        height, across, width = task.shape[1:]
        parts, stride = n * triton.cdiv(images, chunk), 1 if task.size == (height, across) else 2
        # Neighbours read the same pixels: part by part of an image.
        for part in range(parts):
            tile, image = part % n, part // n * chunk
            programs += [
                row.words(number, tile, image, begin + row.vector * parts + part) for row in ours
            ]
        raw += parts * len(ours) * chunk * (not task.rectified)
        heads.append([
            _word((task.source, 2), (int(not task.rectified), 1), (stride, 2)), width, task.pixel,
            _word((height, 15), (across, 16)), _word((task.size[0], 15), (task.size[1], 16)), parts,
        ])  # fmt: skip
        for item in task.products:
            kind = [int(item.depthwise >= 0), max(item.depthwise, 0), item.pointwise]
            split = half if item.spread == 3 else channels
            contraction.append([begin, item.taps, *kind, width, parts, split])
            begin += item.taps * width * parts
    widest, most = max(task.shape[-1] for task in tasks), max(head[5] for head in heads)
    iterations = len(programs) * chunk
    return Division(
        chosen, programs, heads, contraction, chunk, begin, iterations, raw, widest, most
    )


def make_task(
    arrays: Arrays,
    products: tuple[Product, ...],
    inputs: Tensor,
    *,
    rectified: bool,
    source: int = STACK,
    size: Sequence[int] | None = None,
) -> Task:
    """The task of items of a call.

    Args:
        inputs: What they read, ``[n, N, H, W, Cx]``, n arrays without a gap.
        source, rectified: As the attributes.
        size: Of what they make, if not that of ``arrays.y``.
    """
    height, across = size or arrays.y.shape[2:4]
    shape, pixel = tuple(inputs.shape[1:]), pixel_stride(inputs[0])
    return Task(products, source, shape, pixel, (height, across), rectified)


def make_division(arrays: Arrays, tasks: tuple[Task, ...]) -> Division:
    """``divide`` for the arrays of a pass."""
    y = arrays.y
    ampere = y.is_cuda and torch.cuda.get_device_capability(y.device)[0] < 9
    return divide(tasks, y.shape[-1], arrays.channels // 2, y.element_size(), ampere)
