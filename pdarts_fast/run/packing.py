"""Many tensors as one a dtype: writing thousands of small ones costs more than their bytes.

A supernet has thousands of tensors of a few elements. Pickling each takes about 25 µs, and from a
GPU each is a transfer of its own.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

PACKED = "packed"
"""Key of the packed tensors in a packed state."""
# What stands in the place of a tensor; no text of a state begins so.
_PLACE = "\0tensor "


def pack(state: dict[str, Any]) -> dict[str, Any]:
    """A state whose tensors lie in one flat tensor a dtype, on the CPU.

    Args:
        state: Tensors, numbers, texts, lists, tuples and dicts of such; without the key `PACKED`.

    Returns:
        `state` with texts instead of its tensors, and the key `PACKED`.
    """
    tensors: list[Tensor] = []

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.detach())
            return f"{_PLACE}{len(tensors) - 1}"
        if isinstance(value, dict):
            return {key: replaced(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(one) for one in value)
        return value

    skeleton = replaced(state)
    flat: dict[str, list[Tensor]] = defaultdict(list)
    layout = []
    for tensor in tensors:
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        name = str(dense.dtype).removeprefix("torch.")
        layout.append([name, list(dense.shape), list(dense.stride())])
        flat[name].append(dense.as_strided((dense.numel(),), (1,)))
    values = {name: torch.cat(parts).cpu() for name, parts in flat.items()}
    return {**skeleton, PACKED: {"values": values, "layout": json.dumps(layout)}}


def unpack(state: dict[str, Any]) -> dict[str, Any]:
    """What `pack` was given: the same shapes, memory layouts, dtypes and values, on the CPU."""
    packed = state[PACKED]
    offsets: dict[str, int] = defaultdict(int)
    tensors = []
    for name, shape, stride in json.loads(packed["layout"]):
        count = math.prod(shape)
        # A copy: what goes on from a checkpoint changes some of them in place.
        flat = packed["values"][name][offsets[name] : offsets[name] + count].clone()
        tensors.append(flat.as_strided(shape, stride))
        offsets[name] += count

    def restored(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(_PLACE):
            return tensors[int(value.removeprefix(_PLACE))]
        if isinstance(value, dict):
            return {key: restored(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(restored(one) for one in value)
        return value

    return restored({key: value for key, value in state.items() if key != PACKED})


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements are a gapless piece of memory, each there once."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return tensor.numel() > 0 or tensor.is_contiguous()
