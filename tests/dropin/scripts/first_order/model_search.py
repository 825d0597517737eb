# Written as scripts of the field are.
# ruff: noqa: B006, B905, UP
"""A supernet in the style of P-DARTS: switch tables, and dropout behind skips."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from genotypes import PRIMITIVES
from operations import OPS, FactorizedReduce, Identity, ReLUConvBN


class MixedOp(nn.Module):
    def __init__(self, C, stride, switch, p):
        super().__init__()
        self.m_ops = nn.ModuleList()
        self.p = p
        for alive, name in zip(switch, PRIMITIVES):
            if not alive:
                continue
            op = OPS[name](C, stride, False)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            if isinstance(op, Identity) and p > 0:
                op = nn.Sequential(op, nn.Dropout(self.p))
            self.m_ops.append(op)

    def update_p(self):
        for op in self.m_ops:
            if isinstance(op, nn.Sequential) and isinstance(op[0], Identity):
                op[1].p = self.p

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.m_ops))


class Cell(nn.Module):
    def __init__(self, steps, C_prev_prev, C_prev, C, reduction, reduction_prev, switches, p):
        super().__init__()
        self.steps = steps
        self.reduction = reduction
        self.p = p
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.cell_ops = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                switch = switches[len(self.cell_ops)]
                self.cell_ops.append(MixedOp(C, stride, switch, p))

    def update_p(self):
        for op in self.cell_ops:
            op.p = self.p
            op.update_p()

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        first = 0
        for _ in range(self.steps):
            terms = [self.cell_ops[first + j](h, weights[first + j]) for j, h in enumerate(states)]
            first += len(states)
            states.append(sum(terms))
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    def __init__(
        self,
        C,
        num_classes,
        layers,
        criterion,
        steps=4,
        multiplier=4,
        stem_multiplier=3,
        switches_normal=[],
        switches_reduce=[],
        p=0.0,
    ):
        super().__init__()
        self._criterion = criterion
        self.p = p
        self.ops_alive = sum(switches_normal[0])
        stem = stem_multiplier * C
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        )
        before, prev, reduced = stem, stem, False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            switches = switches_reduce if reduction else switches_normal
            self.cells.append(Cell(steps, before, prev, C, reduction, reduced, switches, p))
            before, prev, reduced = prev, multiplier * C, reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(prev, num_classes)
        shape = (len(switches_normal), self.ops_alive)
        self.alphas_normal = nn.Parameter(torch.FloatTensor(1e-3 * np.random.randn(*shape)))
        self.alphas_reduce = nn.Parameter(torch.FloatTensor(1e-3 * np.random.randn(*shape)))

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            weights = F.softmax(alphas, dim=-1 if alphas.size(1) > 1 else 0)
            s0, s1 = s1, cell(s0, s1, weights)
        out = self.global_pooling(s1)
        return self.classifier(out.view(out.size(0), -1))

    def update_p(self):
        for cell in self.cells:
            cell.p = self.p
            cell.update_p()

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def arch_parameters(self):
        return [self.alphas_normal, self.alphas_reduce]
