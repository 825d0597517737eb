"""What all Triton kernels and their launchers share.

Arrays are channels-last; C is a multiple of 16, so every pointer and stride of a kernel is a
multiple of 16 bytes and accesses are 16 bytes wide. Offsets that depend on data are marked with
``tl.multiple_of``. The items of a call are rows of a small int32 table on the device: one launch
serves all items.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from .. import plan
from ..backends import MAX_CHANNELS
from ..calls import Call, Item
from ..interface import Arrays

# Set by TRITON_INTERPRET=1 before triton is imported: kernels run in numpy, on any tensor.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The interpreter pays for every operation of every program, little for its size: larger tiles.
# Tests that want the tiles of a GPU set this to 1.
TILE_SCALE = 8 if INTERPRETED else 1

STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Columns of a table of items, in this order; the last one of TABLE_WIDTH is always zero.
# "number" is the item's place in its call, "out" where kernels that write a stack put its array.
COLUMNS = (
    "kind", "input", "slot", "depthwise", "pointwise", "source", "node", "half", "stream",
    "number", "out",
)  # fmt: skip
TABLE_WIDTH = 16

# Values of the column "kind": convolutions by kernel and dilation, then the rest.
CONV_3, CONV_5, CONV_3_DILATED, CONV_5_DILATED, MAX_POOL, AVG_POOL, FACTORIZED, POINTWISE, SKIP = (
    range(9)
)
_CONVOLUTIONS = {
    (3, 1): CONV_3,
    (5, 1): CONV_5,
    (3, 2): CONV_3_DILATED,
    (5, 2): CONV_5_DILATED,
}
_OTHERS = {
    plan.MAX_POOL: MAX_POOL,
    plan.AVG_POOL: AVG_POOL,
    plan.FACTORIZED: FACTORIZED,
    plan.POINTWISE: POINTWISE,
    plan.SKIP: SKIP,
}

_tables: WeakKeyDictionary[Call, dict[tuple[object, ...], Tensor]] = WeakKeyDictionary()


def gated_storages(channels: int, *, product: bool = False) -> tuple[str, ...]:
    """Storages that the static gate compiles: all at C=32, elsewhere those that searches use.

    Args:
        product: Whether plain TF32 products are a variant of their own.
    """
    rest = ("tf32", "fp16") if product else ("fp16",)
    return ("fp32", "bf16", *rest) if channels == 32 else ("fp32", "bf16")


def kind(item: Item) -> int:
    """An item's value in the column "kind"."""
    if item.kind == plan.CONV:
        return _CONVOLUTIONS[item.kernel, item.dilation]
    return _OTHERS[item.kind]


def table(
    call: Call,
    arrays: Arrays,
    kinds: tuple[int, ...] | None = None,
    changed: Mapping[str, tuple[int, ...]] | None = None,
) -> Tensor | None:
    """The items of a call as int32 ``[n, TABLE_WIDTH]`` on the device; made once.

    ``depthwise`` and ``pointwise`` are offsets into the flat weights, in elements.

    Args:
        kinds: Keep only items of these; None for all.
        changed: Columns with other values than the items', one an item.

    Returns:
        None if no item is left.
    """
    device = arrays.y.device
    key = (device, arrays.training, kinds, tuple((changed or {}).items()))
    found = _tables.setdefault(call, {})
    if key not in found:
        found[key] = _make_table(call, arrays, kinds, changed or {}).to(device)
    made = found[key]
    return made if len(made) else None


def _make_table(
    call: Call,
    arrays: Arrays,
    kinds: tuple[int, ...] | None,
    changed: Mapping[str, tuple[int, ...]],
) -> Tensor:
    offsets = arrays.weights.layout.offsets
    rows = []
    for number, item in enumerate(call.items):
        if kinds is not None and kind(item) not in kinds:
            continue
        values = item._asdict() | {"number": number, "out": number, "kind": kind(item)}
        for name in ("depthwise", "pointwise"):
            values[name] = offsets[values[name]] if values[name] >= 0 else 0
        if not arrays.training:
            values["stream"] = -1
        values.update({name: column[number] for name, column in changed.items()})
        row = [values[name] for name in COLUMNS]
        rows.append(row + [0] * (TABLE_WIDTH - len(row)))
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, TABLE_WIDTH)


def block_channels(channels: int) -> int:
    """The power of two, at least 16, that covers C."""
    return max(16, triton.next_power_of_2(channels))


def operand_dtype(storage: torch.dtype) -> object:
    """dtype of the operands of ``tl.dot``; the interpreter cannot multiply bfloat16."""
    import triton.language as tl

    if storage == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float16 if storage == torch.float16 else tl.float32


def precision(storage: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``.

    float32 products run on the tensor cores as three TF32 products, which keep float32 accuracy,
    or as one if torch's own matrix products may.
    """
    if storage != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Older releases of torch have only the second of both names; newer ones raise on reading it
    # once the first was set.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32" if matmul.allow_tf32 else "tf32x3"


def check_storage(x: Tensor) -> None:
    """Refuses dtypes, channels and sizes that the kernels do not take.

    Places within an array ``[N, H, W, C]`` are 32-bit numbers.

    Raises:
        ValueError: Naming what was given.
    """
    if x.dtype not in STORAGE:
        raise ValueError(f"Triton kernels store float32, bfloat16 or float16, got {x.dtype}")
    if x.shape[-1] > MAX_CHANNELS["triton"]:
        raise ValueError(
            f"Triton kernels take at most {MAX_CHANNELS['triton']} channels, got {x.shape[-1]}: "
            "use backend reference"
        )
    if x.shape[-1] % 16:
        raise ValueError(f"Triton kernels take channels in multiples of 16, got {x.shape[-1]}")
    check_size(x)


def check_size(x: Tensor) -> None:
    """The last of those, of arrays that may have more channels: inputs of cells."""
    if x.shape[-4:].numel() >= 2**31:
        raise ValueError(
            f"Triton kernels take arrays of fewer than 2**31 elements, got {tuple(x.shape[-4:])}: "
            "choose a smaller batch"
        )


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel of ``[N, H, W, C]`` to the next.

    Raises:
        ValueError: Rows or images do not follow one another without a gap.
    """
    from ..cpu.primitives import pixel_stride

    return pixel_stride(x)


def states(arrays: Arrays) -> tuple[list[Tensor], list[int]]:
    """Six state pointers and their pixel strides; those that do not exist repeat the first."""
    found = [*arrays.states, *[arrays.states[0]] * 6][:6]
    return found, [pixel_stride(state) for state in found]
