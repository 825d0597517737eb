# Written as scripts of the field are.
# ruff: noqa: B905, UP
"""The architecture step of DARTS, first or second order, by finite differences."""

import copy

import torch


class Architect:
    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(), lr=args.arch_learning_rate, betas=(0.5, 0.999)
        )

    def weights(self, model):
        arch = {id(p) for p in model.arch_parameters()}
        return [p for p in model.parameters() if id(p) not in arch]

    def step(self, train, valid, eta):
        self.optimizer.zero_grad()
        self.unrolled_step(train, valid, eta)
        self.optimizer.step()

    def look_ahead(self, train, eta):
        """A copy of the model after one step of plain descent on the training batch."""
        twin = copy.deepcopy(self.model) if self.args.copy == "deepcopy" else self.model.new()
        twin.load_state_dict(self.model.state_dict())
        loss = self.model._loss(*train)
        grads = torch.autograd.grad(loss, self.weights(self.model))
        for p, q, g in zip(self.weights(twin), self.weights(self.model), grads):
            p.data = q.data - eta * g
        return twin

    def unrolled_step(self, train, valid, eta):
        twin = self.look_ahead(train, eta)
        twin.zero_grad()
        twin._loss(*valid).backward()
        arch = [p.grad for p in twin.arch_parameters()]
        vector = [p.grad for p in self.weights(twin)]
        for p, g, h in zip(self.model.arch_parameters(), arch, self.second_order(vector, train)):
            p.grad = g - eta * h

    def second_order(self, vector, train, r=1e-2):
        """(d alpha L(w + R v) - d alpha L(w - R v)) / 2 R."""
        R = r / torch.cat([v.view(-1) for v in vector]).norm()
        found = []
        for shift in (R, -2 * R):
            for p, v in zip(self.weights(self.model), vector):
                p.data.add_(shift * v)
            loss = self.model._loss(*train)
            found.append(torch.autograd.grad(loss, self.model.arch_parameters()))
        for p, v in zip(self.weights(self.model), vector):
            p.data.add_(R * v)
        return [(x - y) / (2 * R) for x, y in zip(*found)]
