"""The weights of a cell as the kernels read them: taps before channels, matrices in storage dtype.

    taps[o + t C + c]  = flat[o + c k k + t]     of a depthwise weight at offset o, float32
    pairs[o + t C + c / 2 + c % 2 C / 2]         the same, for what loads two channels at a time
    matrices[i]        = flat[i]                 of a pointwise weight, storage dtype

A transposition of small matrices by an index, so loads are single elements. A whole pass packs in
the launch of ``preprocess.one_by_one`` and keeps all for its backward pass; a launch else.
Reference: ``Weights.matrix``.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weights import Layout, Weights
from .common import gated_storages
from .registry import Specialisation, register

BLOCK = 1024


@triton.jit
def _pack(
    flat_ptr, index_ptr, taps_ptr, pairs_ptr, matrices_ptr, total, first,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Elements from ``first`` on. index, int32 [2, total]: where taps and pairs come from."""
    i = first + tl.arange(0, BLOCK)
    m = i < total
    index = tl.load(index_ptr + i, mask=m, other=0)
    value = tl.load(flat_ptr + index, mask=m, other=0.0)
    tl.store(taps_ptr + i, value, mask=m)
    if PAIRS:
        index = tl.load(index_ptr + total + i, mask=m, other=0)
        tl.store(pairs_ptr + i, tl.load(flat_ptr + index, mask=m, other=0.0), mask=m)
    value = tl.load(flat_ptr + i, mask=m, other=0.0)
    tl.store(matrices_ptr + i, value.to(matrices_ptr.dtype.element_ty), mask=m)


@triton.jit
def _pack_weights_kernel(
    flat_ptr, index_ptr, taps_ptr, pairs_ptr, matrices_ptr, total,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK elements."""
    first = tl.program_id(0) * BLOCK
    _pack(
        flat_ptr, index_ptr, taps_ptr, pairs_ptr, matrices_ptr, total, first, BLOCK, PAIRS
    )  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """What kernels read; offsets are those of ``Weights.flat``.

    Attributes:
        taps: float32 ``[total]``, depthwise weights as ``[kernel * kernel, C]``.
        pairs: As ``[kernel * kernel, 2, C // 2]``, even channels before odd ones, for bfloat16, of
            which stencils load two channels at a time; else the same as ``taps``.
        matrices: Storage dtype ``[total]``, pointwise weights as ``[C, Cx]``.
    """

    taps: Tensor
    pairs: Tensor
    matrices: Tensor

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.taps, self.pairs, self.matrices


_indices: WeakKeyDictionary[Layout, dict[torch.device, Tensor]] = WeakKeyDictionary()
_packed: WeakKeyDictionary[Weights, Packed] = WeakKeyDictionary()


def _index(layout: Layout) -> Tensor:
    """int32 ``[2, total]``: where in the flat weights every packed element comes from."""
    index = torch.arange(layout.total, dtype=torch.int32).repeat(2, 1)
    for offset, (rows, columns) in zip(layout.offsets, layout.padded, strict=True):
        if columns in (9, 25):
            taps, pairs = index[:, offset : offset + rows * columns]
            new = taps.view(rows, columns).t().clone()
            taps.copy_(new.reshape(-1))
            pairs.copy_(new.unflatten(1, (-1, 2)).transpose(1, 2).reshape(-1))
    return index


def index(weights: Weights) -> Tensor:
    """``_index`` on the device of the weights, made once."""
    by_device = _indices.setdefault(weights.layout, {})
    device = weights.flat.device
    if device not in by_device:
        by_device[device] = _index(weights.layout).to(device)
    return by_device[device]


def room(total: int, storage: torch.dtype) -> int:
    """float32 numbers that ``Packed`` takes."""
    arrays = 2 if storage == torch.bfloat16 else 1
    return arrays * total + -(-total * storage.itemsize // 4)


def _within(kept: Tensor, total: int, storage: torch.dtype) -> Packed:
    """``Packed`` in an array of ``room``."""
    taps, rest = kept[:total], kept[total:]
    pairs = taps
    if storage == torch.bfloat16:
        pairs, rest = rest[:total], rest[total:]
    return Packed(taps, pairs, rest.view(storage)[:total])


def packed(weights: Weights, storage: torch.dtype) -> Packed:
    """The packed weights of a pass: those of a whole pass, or made at their first use.

    Args:
        weights: float32; no padding of channels may leave 9 or 25 input channels.
        storage: dtype of the arrays.
    """
    found = _packed.get(weights)
    if found is None or found.matrices.dtype != storage:
        flat, kept = weights.flat, weights.extra
        total = flat.numel()
        ready = kept if kept.numel() else flat.new_empty(room(total, storage))
        found = _packed[weights] = _within(ready, total, storage)
        if not kept.numel():
            _pack_weights_kernel[(triton.cdiv(total, BLOCK),)](
                flat, index(weights), *found.arrays(), total, BLOCK=BLOCK,
                PAIRS=storage == torch.bfloat16,
            )  # fmt: skip
    return found


def _specialisations() -> list[Specialisation]:
    found = []
    for channels, size, weights in ((16, 32, 20_000), (32, 16, 60_000), (64, 8, 200_000)):
        for storage in gated_storages(channels):
            found.append(
                Specialisation(
                    shape=(96, size, size, channels),
                    storage=storage,
                    signature={
                        "flat_ptr": "*fp32",
                        "index_ptr": "*i32",
                        "taps_ptr": "*fp32",
                        "pairs_ptr": "*fp32",
                        "matrices_ptr": f"*{storage}",
                        "total": "i32",
                    },
                    constants={"BLOCK": BLOCK, "PAIRS": storage == "bf16"},
                    divisible=("total",),
                    gathers=True,
                    programs=triton.cdiv(weights, BLOCK),
                    bytes=weights * {"fp32": 16, "fp16": 14, "bf16": 22}[storage],
                )
            )
    return found


register(
    "pack_weights",
    _pack_weights_kernel,
    reference="Weights.matrix",
    maths="taps[o + tC + c] = flat[o + ckk + t]",
    why="a copy: 1024 elements are 8 a thread of 4 warps",
    specialisations=_specialisations,
)
