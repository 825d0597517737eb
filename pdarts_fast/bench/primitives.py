"""Where the time of a pass goes: seconds, arithmetic and memory of every primitive call."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pdarts_fast.kernels import plan
from pdarts_fast.kernels.calls import Call, Item
from pdarts_fast.kernels.interface import Arrays

NAMES = ("fan_out", "mid", "affine_", "mix", "reduce", "mid_backward", "fan_in")


@dataclass
class Cost:
    """Sums over calls: seconds, multiply-adds times two, bytes read and written at least."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0


def _stencil(item: Item) -> float:
    """Multiply-adds a pixel and channel of the depthwise convolution or pool."""
    if item.kind == plan.CONV:
        return item.kernel**2
    return 9.0 if item.kind in (plan.MAX_POOL, plan.AVG_POOL) else 0.0


def _work(name: str, call: Call, arrays: Arrays) -> tuple[float, float]:
    """FLOPs and bytes of a call. A pass over stored arrays counts once an array."""
    pixels, channels = arrays.y[0, ..., 0].numel(), arrays.y.shape[-1]
    array = pixels * channels * arrays.y.element_size()
    backward = arrays.weights.grad is not None
    flops, traffic = 0.0, 0.0
    for item in call.items:
        product = channels if item.pointwise >= 0 else 0
        if name in ("fan_out", "mid"):
            flops += _stencil(item) + product
            traffic += 1 + (name == "mid")
        elif name in ("mix", "reduce"):
            flops += 1 + (name == "reduce")
            traffic += 1
        else:
            # dy W and its transposed stencil; with weight gradients the depthwise output again,
            # the gradient of either weight.
            flops += (product + _stencil(item)) * (1 + backward) + backward * _stencil(item)
            traffic += 2 + (name == "mid_backward") * 2
    return 2 * flops * pixels * channels, (traffic + 1) * array


@contextmanager
def recording(primitives: Any) -> Iterator[dict[str, Cost]]:
    """Measures every call of a backend's primitives inside the block, by name.

    Args:
        primitives: An object with the methods of ``interface.Backend``.
    """
    costs: defaultdict[str, Cost] = defaultdict(Cost)

    def wrap(name: str) -> None:
        original = getattr(primitives, name)

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            original(*arguments)
            cost = costs[name]
            cost.seconds += time.perf_counter() - start
            cost.calls += 1
            if name != "affine_":
                flops, traffic = _work(name, arguments[0], arguments[1])
                cost.flops += flops
                cost.bytes += traffic

        setattr(primitives, name, timed)

    for name in NAMES:
        wrap(name)
    try:
        yield costs
    finally:
        for name in NAMES:
            delattr(primitives, name)
