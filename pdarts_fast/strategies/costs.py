"""What every operation of a derived network costs, as tables that are linear in the choice.

A cost of a genotype is a fixed part plus one entry an operation chosen; the expected cost of
alphas is the same with probabilities. Parameters, multiply-adds and activation memory are exact;
latency is measured once, operation by operation, on this machine.

Source: arXiv 1911.05704 (resource costs); the cost term itself is ours, see docs/strategies.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pdarts_fast.cost import Scale, trace
from pdarts_fast.genotype import PRIMITIVES, Genotype
from pdarts_fast.operations import OPS
from pdarts_fast.search_space import CELL_TYPES, NUM_INPUTS, edge_index, edges
from pdarts_fast.strategies.targets import LATENCY, MACS, MEMORY, PARAMS, Target

BYTES_PER_VALUE = 4  # float32
# A measured latency is the best of so many passes of one image, after so many that do not count.
LATENCY_PASSES, LATENCY_WARM_UP = 20, 3

NONE = PRIMITIVES.index("none")
Probabilities = Mapping[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class CostTable:
    """One resource at evaluation scale.

    Attributes:
        resource: One of ``targets.RESOURCES``.
        fixed: What a network costs without the operations of its cells.
        ops: Cell type -> float64 [14, 8], cost of each primitive on each edge, summed over the
            cells of that type. Parameters, multiply-adds, bytes or seconds.
    """

    resource: str
    fixed: float
    ops: Mapping[str, npt.NDArray[np.float64]]

    def of(self, genotype: Genotype) -> float:
        """Cost of the network of a genotype."""
        total = self.fixed
        for kind in CELL_TYPES:
            for pair, (op, source) in enumerate(getattr(genotype, kind)):
                total += self.ops[kind][edge_index(pair // 2, source), PRIMITIVES.index(op)]
        return float(total)

    def expected(self, probabilities: Probabilities) -> float:
        """Fixed part plus, over edges, q_e times the mean cost of an operation.

        Args:
            probabilities: Cell type -> [14, 8], 0 where an operation is not alive.

        Returns:
            The mean is over all operations but ``none``, with probabilities renormalised; q_e is
            2 / (inputs of the edge's node), the chance of an edge to be kept.
        """
        total = self.fixed
        for kind in CELL_TYPES:
            kept = probabilities[kind].copy()
            kept[:, NONE] = 0
            kept /= kept.sum(axis=1, keepdims=True)
            total += float((edge_shares() * (kept * self.ops[kind]).sum(axis=1)).sum())
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``from_json`` reads back exactly."""
        ops = {kind: self.ops[kind].tolist() for kind in CELL_TYPES}
        return {"resource": self.resource, "fixed": self.fixed, "ops": ops}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CostTable:
        """The table that ``to_json`` wrote."""
        ops = {kind: np.array(values["ops"][kind], dtype=np.float64) for kind in CELL_TYPES}
        return cls(values["resource"], float(values["fixed"]), ops)


def edge_shares() -> npt.NDArray[np.float64]:
    """q_e of every edge: two of a node's edges are kept. Shape [14]."""
    return np.array([2 / (NUM_INPUTS + node) for node, _ in edges()])


def cost_tables(
    targets: Sequence[Target], scale: Scale, device: torch.device
) -> tuple[CostTable, ...]:
    """The tables of some targets, in their order.

    Args:
        scale: The evaluation network.
        device: Where latency is measured.
    """
    tables = []
    for target in targets:
        measure = _Latency(device) if target.resource == LATENCY else _Count(target.resource)
        tables.append(_table(target.resource, scale, measure))
    return tuple(tables)


def _table(resource: str, scale: Scale, measure: _Measure) -> CostTable:
    normal, reduction = _places(scale)
    ops = {}
    for kind, places in (("normal", normal), ("reduce", reduction)):
        table = np.zeros((len(edges()), len(PRIMITIVES)))
        for op, primitive in enumerate(PRIMITIVES):
            if op == NONE:
                continue
            for edge, (_, source) in enumerate(edges()):
                halves = kind == "reduce" and source < NUM_INPUTS
                table[edge, op] = sum(
                    measure.operation(primitive, C, 2, before)
                    if halves
                    else measure.operation(primitive, C, 1, side)
                    for C, before, side in places
                )
        ops[kind] = table
    nothing = [("none", 0), ("none", 1)] * 4
    concat = [2, 3, 4, 5]
    empty = Genotype(nothing, concat, list(nothing), concat)
    return CostTable(resource, measure.network(scale, empty), ops)


def _places(scale: Scale) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(channels, side of the inputs, side of the nodes) of every normal and reduction cell."""
    normal, reduction = [], []
    C, side = scale.C, scale.image_size
    for index in range(scale.layers):
        if index in (scale.layers // 3, 2 * scale.layers // 3):
            C, before, side = 2 * C, side, -(-side // 2)
            reduction.append((C, before, side))
        else:
            normal.append((C, side, side))
    return normal, reduction


class _Measure:
    """Cost of one operation and of a whole network."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], float] = {}

    def operation(self, primitive: str, C: int, stride: int, side: int) -> float:
        """Cost of a derived operation on [1, C, side, side]; looked up once."""
        key = (primitive, C, stride, side)
        if key not in self._known:
            self._known[key] = self._operation(*key)
        return self._known[key]

    def network(self, scale: Scale, genotype: Genotype) -> float:
        """Cost of a whole network."""
        raise NotImplementedError

    def _operation(self, primitive: str, C: int, stride: int, side: int) -> float:
        raise NotImplementedError


class _Count(_Measure):
    """Parameters, multiply-adds or activation bytes, counted on the meta device."""

    def __init__(self, resource: str) -> None:
        super().__init__()
        self._resource = resource

    def network(self, scale: Scale, genotype: Genotype) -> float:
        shape = (1, 3, scale.image_size, scale.image_size)
        return self._count(scale.build(genotype, "meta"), shape)

    def _operation(self, primitive: str, C: int, stride: int, side: int) -> float:
        with torch.device("meta"):
            module = OPS[primitive](C, stride, True)
        return self._count(module, (1, C, side, side))

    def _count(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        cost, values = trace(module, torch.empty(shape, device="meta"))
        return float(
            {
                PARAMS: cost.parameters,
                MACS: cost.multiply_adds,
                MEMORY: values * BYTES_PER_VALUE,
            }[self._resource]
        )


class _Latency(_Measure):
    """Seconds of a forward pass of one image in evaluation mode, the best of several."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def network(self, scale: Scale, genotype: Genotype) -> float:
        image = torch.randn(1, 3, scale.image_size, scale.image_size, device=self._device)
        network = scale.build(genotype, self._device).eval()
        return self._time(lambda: network(image))

    def _operation(self, primitive: str, C: int, stride: int, side: int) -> float:
        if primitive == "skip_connect" and stride == 1:
            return 0.0
        with torch.device(self._device):
            module = OPS[primitive](C, stride, True).eval()
            image = torch.randn(1, C, side, side)
        return self._time(lambda: module(image))

    @torch.inference_mode()
    def _time(self, run: Callable[[], Any]) -> float:
        best = float("inf")
        for number in range(LATENCY_WARM_UP + LATENCY_PASSES):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            if number >= LATENCY_WARM_UP:
                best = min(best, time.perf_counter() - start)
        return best

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class ExpectedCosts(nn.Module):
    """sum_r c_r E_r / T_r of alphas, differentiable; coefficients c change in place.

    Args:
        tables: One a resource.
        targets: In the same order.
        switches: Live primitives of the stage, bool [14, 8] per cell type.

    Attributes:
        coefficients: float32 [resources], weight times gate; 0 to begin with.
    """

    coefficients: Tensor
    fixed: Tensor

    def __init__(
        self,
        tables: Sequence[CostTable],
        targets: Sequence[Target],
        switches: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        super().__init__()
        self.register_buffer("coefficients", torch.zeros(len(tables)))
        self.register_buffer("fixed", _per_target([table.fixed for table in tables], targets))
        for kind in CELL_TYPES:
            alive = switches[kind]
            width = int(alive[0].sum())
            names = np.broadcast_to(np.arange(len(PRIMITIVES)), alive.shape)[alive]
            is_none = (names == NONE).reshape(-1, width)
            costs = np.stack(
                [
                    edge_shares()[:, None] * table.ops[kind][alive].reshape(-1, width)
                    for table in tables
                ]
            )
            self.register_buffer(f"none_{kind}", torch.from_numpy(is_none.copy()))
            self.register_buffer(f"costs_{kind}", _per_target(costs, targets))

    def expected(self, alphas: Sequence[Tensor]) -> Tensor:
        """E_r / T_r of every resource, float [resources], from both alphas [14, k]."""
        total = self.fixed
        for kind, table in zip(CELL_TYPES, alphas, strict=True):
            barred = table.masked_fill(getattr(self, f"none_{kind}"), -float("inf"))
            total = total + torch.einsum(
                "rek,ek->r", getattr(self, f"costs_{kind}"), barred.softmax(dim=-1)
            )
        return total

    def forward(self, alphas: Sequence[Tensor]) -> Tensor:
        """The term of the alpha loss, a scalar."""
        return (self.coefficients * self.expected(alphas)).sum()


def _per_target(values: Any, targets: Sequence[Target]) -> Tensor:
    """Costs [resources, ...] in units of their target, float32."""
    limits = np.array([target.limit for target in targets])
    array = np.asarray(values, dtype=np.float64)
    return torch.tensor(array / limits.reshape(-1, *[1] * (array.ndim - 1)), dtype=torch.float32)
