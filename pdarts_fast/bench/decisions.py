"""Which side every ReLU and maximum pool of a pass took, and the published graph with those sides.

A ReLU at zero and a maximum pool at a tie are not differentiable. In float32 one in a million to
ten million of them takes another side than in float64 (it flips), which changes gradients far more
than rounding does. A float64 graph that takes the sides of a float32 pass shows rounding alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.kernels import cell as fused
from pdarts_fast.kernels.calls import Call, of
from pdarts_fast.kernels.interface import Arrays
from pdarts_fast.supernet import Cell, Network

Decisions = dict[str, Tensor]
"""By module: bool, where a ReLU passes its input; int64, the pixels that a maximum pool takes."""


def _decide(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.MaxPool2d):
        size, stride, padding = module.kernel_size, module.stride, module.padding
        return F.max_pool2d(x, size, stride, padding, return_indices=True)[1]
    return x > 0


def _deciding(network: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.ReLU, nn.MaxPool2d)
    return {name: m for name, m in network.named_modules() if isinstance(m, kinds)}


@contextmanager
def of_published(network: Network) -> Iterator[Decisions]:
    """Notes the decisions of a pass op by op inside the block."""
    found: Decisions = {}

    def note(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found[name] = _decide(module, inputs[0].detach())

        return before

    modules = _deciding(network).items()
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _readers(cell: Cell, source: int) -> list[str]:
    """Modules of a cell that decide on the state ``source``."""
    names = []
    edge = 0
    for node in range(cell.steps):
        for leaves in range(2 + node):
            if leaves == source:
                # Behind the first BatchNorm of a separable convolution lies its second half.
                inside = _deciding(cell.cell_ops[edge])
                names += [f"cell_ops.{edge}.{name}" for name in inside if not name.endswith("op.4")]
            edge += 1
    return names


@contextmanager
def of_fused(network: Network, backend: str) -> Iterator[Decisions]:
    """Notes the decisions of a float32 pass, primitive by primitive, inside the block.

    Args:
        network: Cells of ``backend`` that need no padding; it has run before.
        backend: A fused one.
    """
    found: Decisions = {}
    # What a call reads: modules, in a cell.
    whose: dict[Call, tuple[str, Cell, list[str]]] = {}
    for number, cell in enumerate(network.cells):
        assert isinstance(cell, Cell)
        calls, prefix = of(fused.prepare(cell).key), f"cells.{number}."
        for call, name in zip(calls.inputs, ("preprocess0", "preprocess1"), strict=True):
            names = [f"{name}.{inside}" for inside in _deciding(cell.get_submodule(name))]
            whose[call] = (prefix, cell, names)
        for source, call in enumerate(calls.leave):
            whose[call] = (prefix, cell, _readers(cell, source))
        for call in calls.second:
            names = [f"cell_ops.{item.edge}.m_ops.{item.op}.op.4" for item in call.items]
            whose[call] = (prefix, cell, names)

    primitives: Any = fused.backend_named(backend)
    fan_out, mid = primitives.fan_out, primitives.mid

    def note(call: Call, inputs: list[Tensor]) -> None:
        prefix, cell, names = whose[call]
        for name, x in zip(names, inputs, strict=True):
            found[prefix + name] = _decide(cell.get_submodule(name), x.permute(0, 3, 1, 2))

    def noted_fan_out(call: Call, arrays: Arrays, x: Tensor, sums: Tensor) -> None:
        note(call, [x] * len(whose[call][2]))
        fan_out(call, arrays, x, sums)

    def noted_mid(call: Call, arrays: Arrays, scale: Tensor, shift: Tensor, sums: Tensor) -> None:
        halves = [arrays.y[item.input].double() for item in call.items]
        factors = zip(scale.double(), shift.double(), strict=True)
        # In float64 the sign is that of a fused multiply-add.
        note(call, [y * a + b for y, (a, b) in zip(halves, factors, strict=True)])
        mid(call, arrays, scale, shift, sums)

    primitives.fan_out, primitives.mid = noted_fan_out, noted_mid
    try:
        with fused.primitive_by_primitive(backend):
            yield found
    finally:
        del primitives.fan_out, primitives.mid


class _Decided(nn.Module):
    """A ReLU or a maximum pool whose decision was made elsewhere."""

    def __init__(self, decision: Tensor) -> None:
        super().__init__()
        self.decision = decision

    def forward(self, x: Tensor) -> Tensor:
        if self.decision.dtype == torch.bool:
            return x * self.decision
        return x.flatten(2).gather(2, self.decision.flatten(2)).view(self.decision.shape)


def imposed(network: Network, decisions: Decisions) -> Network:
    """A copy of a published graph that takes these decisions.

    Raises:
        ValueError: They are not one of every ReLU and maximum pool.
    """
    made = copy.deepcopy(network)
    missing = set(_deciding(made)) ^ set(decisions)
    if missing:
        raise ValueError(f"decisions and modules differ: {sorted(missing)}")
    for name, decision in decisions.items():
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, _Decided(decision))
    return made


def differing(one: Decisions, other: Decisions) -> int:
    """How many decisions of two passes differ."""
    return sum(int((decision != other[name]).sum()) for name, decision in one.items())
