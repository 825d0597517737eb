"""Bytes that a launch must move: each array once, in the dtype it is stored in.

What fits into the second-level cache is read once however many programs share it, so this is the
least a launch can move, and its roofline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .. import plan
from ..calls import Item

if TYPE_CHECKING:
    from .recorder import Launch


def _whole(launch: Launch, *names: str) -> int:
    """Bytes of arguments that are read or written from end to end."""
    values = (launch.values[name] for name in names)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _states(launch: Launch) -> int:
    """Bytes of one or both states that a launch reads."""
    both = launch.values["x1_ptr"] is not launch.values["x_ptr"]
    return _whole(launch, "x_ptr", *["x1_ptr"] * both)


def _array(launch: Launch) -> int:
    """Bytes of one ``[N, H, W, C]`` of the outputs of the launch's call."""
    images, height, width, channels = launch.size
    return images * height * width * channels * (4 if launch.storage == "fp32" else 2)


def _gradients(items: Sequence[Item]) -> int:
    """Gradients that a call reads: one of every half, and of every node once."""
    halves = [i for i in items if i.half >= 0 and i.input < 0]
    return len(halves) + len({i.node for i in items if i not in halves})


def _read_for_weights(launch: Launch, array: int) -> int:
    """Bytes that ``weight_products`` reads: what items read, their outputs and gradients."""
    assert launch.call is not None
    stack, large = (launch.values[name] for name in ("stack_ptr", "large_ptr"))
    ours = [item for item in launch.call.items if item.pointwise >= 0]
    found = 0
    if launch.values["state_ptr"] is not stack:  # a whole pass: preprocessing of both inputs too
        ours = ours[:-2]
        names = ("input_ptr", "input1_ptr", "state_ptr", "state1_ptr", "grads_ptr")
        found = _whole(launch, *names)
    read = {(item.source, item.input, item.stride) for item in ours}
    for _, _, stride in read:
        one = (stack if stride == 1 else large)[0]
        found += one.numel() * one.element_size()
    return found + (len(ours) + _gradients(ours)) * array


def _packing(launch: Launch) -> int:
    """Bytes that packing the weights of a cell moves."""
    paired = ["pairs_ptr"] * launch.values["PAIRS"]
    read = _whole(launch, "flat_ptr") + _whole(launch, "index_ptr") // (2 - len(paired))
    return read + _whole(launch, "taps_ptr", *paired, "matrices_ptr")


def _forward(launch: Launch, array: int) -> int | None:
    name, items = launch.name, [] if launch.call is None else launch.call.items
    if name == "fan_out":
        written = _whole(launch, "partials_ptr") + len(items) * array
        if launch.values["SECOND"]:
            return len(items) * array + written
        if launch.values["STRIDE"] == 2:
            return _states(launch) + written
        # States for pools, relu of them for convolutions.
        return len({(item.source, item.kind == plan.CONV) for item in items}) * array + written
    if name == "one_by_one":
        return (
            _states(launch)
            + _whole(launch, "partials_ptr")
            + array * len(items)
            + (_packing(launch) if launch.values["PACK"] else 0)
        )
    if name == "affine":
        return (2 + launch.values["KEEP"]) * array * max(1, len(items))
    if name == "mix":
        return (1 + len(items) + launch.values["KEEP"]) * array
    return None


def _backward(launch: Launch, array: int) -> int:
    assert launch.call is not None
    name, items = launch.name, launch.call.items
    if name == "reduce":
        return (1 + len(items)) * array + _whole(launch, "partials_ptr")
    if name == "output_gradient":
        slots = len({item.slot for item in items if item.slot >= 0})
        written = _whole(launch, "out_ptr")
        rectified = launch.values["rectified_ptr"]
        more = 0
        if rectified is not launch.values["out_ptr"]:
            more = 2 * rectified.numel() * rectified.element_size()
        if launch.values["ENTERING"]:
            more += _whole(launch, "partials_ptr")
        return (slots + _gradients(items)) * array + written + more
    if name == "transposed":
        count = launch.grid[0]
        read = _whole(launch, "dz_ptr")
        if launch.values["SECOND"]:
            return read + 2 * count * array + _whole(launch, "partials_ptr")
        return read + _whole(launch, "out_ptr")
    if name == "fan_in":
        skips = sum(item.kind == plan.SKIP for item in items)
        reduces = 2 * sum(item.kind == plan.FACTORIZED for item in items)
        read = _states(launch) + _whole(launch, "parts_ptr", "out_ptr")
        incoming = launch.values["INCOMING"] * _whole(launch, "out_ptr")
        return read + incoming + (skips + reduces) * array
    if name == "weight_products":
        return _read_for_weights(launch, array) + _whole(launch, "partials_ptr")
    if name == "pointwise_backward":
        return 2 * len(items) * array + 2 * _states(launch)
    raise ValueError(f"no count of bytes for kernel {name}")


def traffic(launch: Launch) -> int:
    """Bytes of one launch.

    Raises:
        ValueError: The kernel is not known here.
    """
    if launch.name in ("fold", "sum_partials", "coefficients", "weight_gradients"):
        return _whole(launch, "partials_ptr")
    if launch.name == "pack_weights":
        return _packing(launch)
    if launch.name == "running":
        return launch.programs * (launch.values["channels"] * 32 + 48)
    array = _array(launch)
    found = _forward(launch, array)
    return _backward(launch, array) if found is None else found
