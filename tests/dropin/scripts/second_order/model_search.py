# Written as scripts of the field are.
# ruff: noqa: B905, UP
"""A supernet in the style of DARTS, with module names of its own."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from genotypes import PRIMITIVES, Genotype
from operations import OPS, Halve, Squeeze


class MixedOp(nn.Module):
    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList()
        for name in PRIMITIVES:
            op = OPS[name](C, stride)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Cell(nn.Module):
    def __init__(self, steps, multiplier, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.reduction = reduction
        self._steps = steps
        self._multiplier = multiplier
        self.pre0 = Halve(C_prev_prev, C) if reduction_prev else Squeeze(C_prev_prev, C)
        self.pre1 = Squeeze(C_prev, C)
        self._ops = nn.ModuleList()
        self._bns = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                self._ops.append(MixedOp(C, 2 if reduction and j < 2 else 1))

    def forward(self, s0, s1, weights):
        states = [self.pre0(s0), self.pre1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(nn.Module):
    def __init__(self, C, num_classes, layers, criterion, steps=4, multiplier=4):
        super().__init__()
        self._args = (C, num_classes, layers, criterion, steps, multiplier)
        self._criterion = criterion
        self._steps = steps
        stem = 3 * C
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        )
        before, prev, reduced = stem, stem, False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(steps, multiplier, before, prev, C, reduction, reduced))
            before, prev, reduced = prev, multiplier * C, reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(prev, num_classes)
        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(edges, len(PRIMITIVES)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(edges, len(PRIMITIVES)))

    def new(self):
        model = Network(*self._args).to(self.alphas_normal.device)
        for x, y in zip(model.arch_parameters(), self.arch_parameters()):
            x.data.copy_(y.data)
        return model

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, F.softmax(alphas, dim=-1))
        out = self.global_pooling(s1)
        return self.classifier(out.view(out.size(0), -1))

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        return [self.alphas_normal, self.alphas_reduce]

    def genotype(self):
        def parse(weights):
            genes, offset = [], 0
            for i in range(self._steps):
                rows = weights[offset : offset + 2 + i]
                best = rows[:, 1:].max(1)
                chosen = sorted(range(2 + i), key=lambda j: -best.values[j].item())[:2]
                genes += [(PRIMITIVES[1 + best.indices[j].item()], j) for j in sorted(chosen)]
                offset += 2 + i
            return genes

        concat = list(range(2, self._steps + 2))
        normal, reduce = (F.softmax(a.data.cpu(), dim=-1) for a in self.arch_parameters())
        return Genotype(parse(normal), concat, parse(reduce), concat)
