"""What the launches and operators of a pass do, for ``predict_model``: bytes, slots, products.

Instructions of the kernels that are not bound by memory are those of the loops in their machine
code, which is compiled for sm_90 whatever the card, not those of a run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdarts_fast.bench.predict_model import LANES, Work
from pdarts_fast.kernels import plan
from pdarts_fast.kernels.triton.machine_code import measure
from pdarts_fast.kernels.triton.recorder import FREE, Launch
from pdarts_fast.kernels.triton.registry import kernels
from pdarts_fast.kernels.triton.traffic import traffic
from pdarts_fast.kernels.triton.weight_tasks import Division

TARGET = "sm_90"
# Kernels whose loops are stencils: what their machine code spends on each multiply-add counts.
STENCILS = ("fan_out", "transposed")
# Of a program outside of its loops, a warp.
PROLOGUE = 250
# For every 16 bytes a warp moves in kernels bound by memory: widen, multiply, round, address.
SLOTS_PER_ACCESS = 24
ACCESS = 16 * LANES


def _pixels(launch: Launch) -> int:
    images, height, width, channels = launch.size
    return images * height * width * channels


def multiply_adds(launch: Launch) -> int:
    """Of the stencils of a call's items: ``M C k^2`` each, 9 for a pool."""
    items = [] if launch.call is None else launch.call.items
    kinds = (plan.CONV, plan.MAX_POOL, plan.AVG_POOL)
    taps = sum((item.kernel or 3) ** 2 for item in items if item.kind in kinds)
    return _pixels(launch) * taps


def iterations(launch: Launch) -> tuple[int, int]:
    """Tiles that all programs of ``weight_products`` go through: not yet rectified, and others."""
    division = next(one for one in launch.arguments if isinstance(one, Division))
    return division.raw * launch.grid[1], (division.iterations - division.raw) * launch.grid[1]


def product_flops(launch: Launch) -> float:
    """In tensor cores; 0 for kernels without."""
    values = launch.values
    if launch.name == "weight_products":
        tile = values["BLOCK_K"] * values["BLOCK_P"] * values["BLOCK_N"]
        return 2.0 * sum(iterations(launch)) * tile
    items = [] if launch.call is None else launch.call.items
    convolutions = sum(item.kind == plan.CONV for item in items)
    channels = launch.size[-1]
    if launch.name in ("fan_out", "output_gradient"):
        reduces = sum(item.kind == plan.FACTORIZED for item in items)
        return 2.0 * _pixels(launch) * channels * (convolutions + 2 * reduces)
    if launch.name in ("pointwise_backward", "one_by_one"):
        widths = ("CX", "CX1") if launch.name == "pointwise_backward" else ("C_IN", "C_IN1")
        # A factorized reduce is two products, of even and of odd pixels.
        depths = [
            values[widths[item.source == 1 and len(items) > 1]] * (1 + item.stride // 2)
            for item in items
        ]
        return 2.0 * _pixels(launch) * sum(depths)
    return 0.0


def loops(launch: Launch) -> list[tuple[int, int]]:
    """Innermost loops of a kernel's sm_90 code, compiled at its first use and then cached.

    Raises:
        ValueError: It does not compile.
    """
    code = measure(kernels()[launch.name], launch.specialisation(bytes=0), TARGET)
    if not code.loops:
        raise ValueError(f"kernel {launch.name}: no loop in its code {code.failure}")
    return code.loops


def stencil_density(found: list[tuple[int, int]]) -> float:
    """Instructions for a multiply-add, of all loops that are made of such.

    Loads, widening of bfloat16, masks and addresses are the rest.
    """
    ours = [(length, adds) for length, adds in found if 4 * adds >= length]
    return sum(length for length, _ in ours) / sum(adds for _, adds in ours)


def slots(launch: Launch) -> float:
    """Warp instructions of all programs."""
    warps = launch.programs * int(launch.options.get("num_warps", 4))
    if launch.name in STENCILS:
        density = stencil_density(loops(launch))
        return warps * PROLOGUE + multiply_adds(launch) / LANES * density
    if launch.name == "weight_products":
        # One loop for rectified inputs, and a longer one for those that it rectifies.
        bodies = sorted(length for length, _ in loops(launch))
        raw, others = iterations(launch)
        each = int(launch.options.get("num_warps", 4))
        return float(warps * PROLOGUE + each * (others * bodies[0] + raw * bodies[-1]))
    return warps * PROLOGUE / 4 + traffic(launch) / ACCESS * SLOTS_PER_ACCESS


def work(launch: Launch) -> Work:
    """What the model needs of a launch."""
    moved = traffic(launch)
    return Work(launch.name, moved, slots(launch), product_flops(launch), launch.programs)


class EagerOperators(TorchDispatchMode):
    """Bytes of the operators of eager torch that launch something, on any device.

    Attributes:
        moved: Bytes read and written by each operator, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in FREE:
            outputs = found if isinstance(found, (tuple, list)) else (found,)
            tensors = [x for x in (*args, *outputs) if isinstance(x, Tensor)]
            self.moved.append(sum(x.numel() * x.element_size() for x in tensors))
        return found


def published_operators(network: torch.nn.Module, batch: int) -> list[int]:
    """Bytes of every operator of a forward and backward pass of the published graph.

    Args:
        network: On device ``meta``, with backend ``reference``.
    """
    images = torch.empty(batch, 3, 32, 32, device="meta")
    with EagerOperators() as operators:
        logits = network(images)
        (logits[0] if isinstance(logits, tuple) else logits).sum().backward()
    return operators.moved
