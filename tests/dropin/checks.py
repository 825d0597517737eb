"""Models around the cells of ``zoo``, and comparisons, for the tests of ``accelerate``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.dropin import swap

# float32 against float32: a few hundred roundings of 2**-24 each, relative to the largest value.
TOLERANCE = 2e-5


def few(edge: int) -> tuple[str, ...]:
    return (
        ("sep_3", "skip", "none"),
        ("dil_3", "max_pool", "skip"),
        ("skip", "avg_pool", "sep_3"),
    )[edge % 3]


def ragged(edge: int) -> tuple[str, ...]:
    return (("sep_3", "gate"), ("skip", "max_pool", "dil_5"))[edge % 2]


def tower(zoo: ModuleType, names: Any = few, cells: int = 1, **arguments: Any) -> nn.Module:
    """A model with small search cells."""
    torch.manual_seed(0)
    arguments = {"steps": 2, "multiplier": 2, **arguments}
    made = [zoo.SearchCell(names, **arguments) for _ in range(cells)]
    return zoo.Tower(made, arguments["multiplier"] * arguments.get("C", 4))


def batch(size: int = 3, side: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    return images, torch.randint(0, 3, (size,), generator=generator)


def is_fused(model: nn.Module) -> bool:
    return any(swap.is_swapped(module) for module in model.modules())


def close(got: Tensor, wanted: Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    error = (got - wanted).abs().max().item()
    scale = max(wanted.abs().max().item(), 1e-3)
    assert error <= tolerance * scale, f"{name}: off by {error:.1e} of {scale:.1e}"


def close_gradients(got: nn.Parameter, wanted: nn.Parameter, name: str) -> None:
    assert got.grad is not None, name
    assert wanted.grad is not None, name
    close(got.grad, wanted.grad, name, 2e-4)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects a plan for every call that really runs fused."""
    from pdarts_fast.dropin import fused

    seen: list[Any] = []
    real = fused.run

    def counted(plan: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(plan)
        return real(plan, *args, **kwargs)

    monkeypatch.setattr(fused, "run", counted)
    return seen


def compare_steps(plain: nn.Module, fast: nn.Module, steps: int = 2) -> None:
    """Loss, all gradients and buffers of a few steps, and evaluation."""
    optimisers = [torch.optim.SGD(model.parameters(), 0.05) for model in (plain, fast)]
    for step in range(steps):
        images, labels = batch(seed=step)
        losses = []
        for model, optimiser in zip((plain, fast), optimisers, strict=True):
            torch.manual_seed(step)
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            losses.append(loss.detach())
        close(losses[1], losses[0], f"loss {step}")
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                close(q.grad, p.grad, f"gradient of {name}", 2e-4)
        for optimiser in optimisers:
            optimiser.step()
    for (name, b), c in zip(plain.named_buffers(), fast.buffers(), strict=True):
        close(c.float(), b.float(), name)
    plain.eval()
    fast.eval()
    with torch.no_grad():
        close(fast(images), plain(images), "evaluation")
