"""Search and derived cells as other people write them, with every deviation a test needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ALL = (
    "none",
    "max_pool",
    "avg_pool",
    "skip",
    "sep_3",
    "sep_5",
    "dil_3",
    "dil_5",
)


class Pass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zeros(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Chain(nn.Module):
    """Layers under a name of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Reduce(nn.Module):
    def __init__(self, C_in: int, C_out: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.left = nn.Conv2d(C_in, C_out // 2, 1, 2, bias=False)
        self.right = nn.Conv2d(C_in, C_out - C_out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.norm(torch.cat([self.left(x), self.right(x[:, :, 1:, 1:])], dim=1))


class Gate(nn.Module):
    """A custom operation with a parameter, a layer and randomness."""

    def __init__(self, C: int, stride: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((C, 1, 1), 0.5))
        self.conv = nn.Conv2d(C, C, 3, stride, 1, bias=True)
        self.dropout = nn.Dropout2d(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.sigmoid(self.conv(x)) * self.scale)


def convolution(C: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(C, C, kernel, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ]


def build(name: str, C: int, stride: int, affine: bool, rate: float = 0.0) -> nn.Module:
    """A fresh operation of one of the names in ALL, or ``gate``, ``sep_7``, ``bare_max``."""
    kernel = int(name[-1]) if name[-1].isdigit() else 3
    if name.startswith("sep"):
        halves = [*convolution(C, kernel, stride, 1, affine), *convolution(C, kernel, 1, 1, affine)]
        return Chain(*halves)
    if name.startswith("dil"):
        return Chain(*convolution(C, kernel, stride, 2, affine))
    if name == "none":
        return Zeros(stride)
    if name == "gate":
        return Gate(C, stride)
    if name == "skip":
        if stride == 2:
            return Reduce(C, C, affine)
        return nn.Sequential(Pass(), nn.Dropout(rate)) if rate else Pass()
    pool: nn.Module = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name.endswith("max") or name == "max_pool":
        pool = nn.MaxPool2d(3, stride, 1)
    if name.startswith("bare"):
        return pool
    return nn.Sequential(pool, nn.BatchNorm2d(C, affine=affine))


class Mixed(nn.Module):
    def __init__(self, ops: Sequence[nn.Module], strict: bool = False) -> None:
        super().__init__()
        self.choices = nn.ModuleList(ops)
        self.strict = strict

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        pairs = zip(weights, self.choices, strict=self.strict)
        return sum(w * op(x) for w, op in pairs)  # type: ignore[return-value]


class SearchCell(nn.Module):
    """A search cell; ``names(edge)`` gives the operations of an edge."""

    def __init__(
        self,
        names: Callable[[int], Sequence[str]] = lambda edge: ALL,
        *,
        C: int = 4,
        C_in: tuple[int, int] = (6, 8),
        reduction: bool = False,
        reduction_prev: bool = False,
        steps: int = 4,
        multiplier: int = 4,
        affine: bool = False,
        rate: float = 0.0,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.steps, self.multiplier = steps, multiplier
        self.in0 = (
            Reduce(C_in[0], C, affine) if reduction_prev else self._squeeze(C_in[0], C, affine)
        )
        self.in1 = self._squeeze(C_in[1], C, affine)
        self.edges = nn.ModuleList()
        for node in range(steps):
            for source in range(2 + node):
                stride = 2 if reduction and source < 2 else 1
                picked = names(len(self.edges))
                ops = [build(n, C, stride, affine, rate) for n in picked]
                self.edges.append(Mixed(ops, strict))

    @staticmethod
    def _squeeze(C_in: int, C: int, affine: bool) -> nn.Module:
        layers = (nn.ReLU(), nn.Conv2d(C_in, C, 1, bias=False), nn.BatchNorm2d(C, affine=affine))
        return nn.Sequential(*layers)

    def forward(self, s0: Tensor, s1: Tensor, weights: Any) -> Tensor:
        states = [self.in0(s0), self.in1(s1)]
        edge = 0
        for _ in range(self.steps):
            total: Any = 0
            for state in states:
                total = total + self.edges[edge](state, weights[edge])
                edge += 1
            states.append(total)
        return torch.cat(states[-self.multiplier :], dim=1)

    @property
    def sizes(self) -> list[int]:
        return [len(edge.choices) for edge in self.edges]  # type: ignore[arg-type,union-attr]


class HalvedCell(SearchCell):
    """The same modules, put to another use."""

    def forward(self, s0: Tensor, s1: Tensor, weights: Any) -> Tensor:
        return 0.5 * super().forward(s0, s1, weights)


class WeightedCell(SearchCell):
    """Takes a fourth argument, as PC-DARTS cells do."""

    def forward(self, s0: Tensor, s1: Tensor, weights: Any, edge_weights: Any) -> Tensor:  # type: ignore[override]
        return super().forward(s0, s1, weights) * edge_weights.sum()


class PartialMixed(Mixed):
    """A mixed operation with a pool of its own for the channels it leaves out."""

    def __init__(self, ops: Sequence[nn.Module]) -> None:
        super().__init__(ops)
        self.pool = nn.MaxPool2d(2, 2)


def drop_path(x: Tensor, probability: float) -> Tensor:
    keep = 1.0 - probability
    mask = torch.empty(x.size(0), 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x.div(keep).mul(mask)


class DerivedCell(nn.Module):
    """A derived cell with the layout of attributes that scripts use."""

    def __init__(
        self,
        pairs: Sequence[tuple[str, int]],
        concat: Sequence[int],
        *,
        C: int = 4,
        C_in: tuple[int, int] = (6, 8),
        reduction: bool = False,
        reduction_prev: bool = False,
    ) -> None:
        super().__init__()
        self.in0 = (
            Reduce(C_in[0], C, True) if reduction_prev else SearchCell._squeeze(C_in[0], C, True)
        )
        self.in1 = SearchCell._squeeze(C_in[1], C, True)
        self._steps = len(pairs) // 2
        self._concat = list(concat)
        self._indices = tuple(source for _, source in pairs)
        self._ops = nn.ModuleList()
        for name, source in pairs:
            stride = 2 if reduction and source < 2 else 1
            name = f"bare_{name[:3]}" if "pool" in name else name
            self._ops.append(build(name, C, stride, True))

    def forward(self, s0: Tensor, s1: Tensor, drop_prob: float) -> Tensor:
        states = [self.in0(s0), self.in1(s1)]
        for i in range(self._steps):
            terms = []
            for k in (2 * i, 2 * i + 1):
                terms.append(self._ops[k](states[self._indices[k]]))
            for k, term in enumerate(terms):
                op = self._ops[2 * i + k]
                if self.training and drop_prob > 0.0 and not isinstance(op, Pass):
                    terms[k] = drop_path(term, drop_prob)
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self._concat], dim=1)


class Tower(nn.Module):
    """A few cells between a stem and a classifier; search cells get softmaxed alphas."""

    def __init__(self, cells: Sequence[nn.Module], channels: int, stem: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.widen = nn.Conv2d(stem, 8, 1)
        self.cells = nn.ModuleList(cells)
        first = cells[0]
        edges, most = len(first.edges), max(first.sizes)  # type: ignore[arg-type,type-var]
        self.alphas = nn.Parameter(torch.randn(edges, most))  # type: ignore[call-overload]
        self.classifier = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        s0 = self.stem(x)
        s1 = self.widen(s0)
        for cell in self.cells:
            s1 = cell(s0, s1, F.softmax(self.alphas, dim=-1))
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))
