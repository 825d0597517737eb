"""Whole passes of a recognised cell in one call: the same numbers, and only where they apply."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin_checks import batch, close, compare_steps, ragged, tower
from torch import Tensor, nn

from pdarts_fast.cells import whole
from pdarts_fast.dropin import accelerate
from pdarts_fast.kernels import backends
from pdarts_fast.kernels.cell import primitive_by_primitive
from pdarts_fast.kernels.cpu import draw
from pdarts_fast.kernels.cpu.whole_cell import CompiledCell

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]

WHOLE: dict[str, dict[str, Any]] = {
    "few-ops": {},
    "reduction": {"reduction": True},
    "padded-channels": {"C": 5, "reduction": True},
    "sixteen-channels": {"C": 16},
    "three-steps-one-out": {"steps": 3, "multiplier": 1},
    "skip-dropout": {"rate": 0.4},
    "skip-dropout-sixteen-channels": {"rate": 0.7, "C": 16},
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the whole passes that ran."""
    seen: list[str] = []
    for name in ("forward", "backward", "draw", "move_running"):
        real = getattr(CompiledCell, name)

        def counted(self: Any, *args: Any, real: Any = real, name: str = name) -> Any:
            seen.append(name)
            return real(self, *args)

        monkeypatch.setattr(CompiledCell, name, counted)
    return seen


def step(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, gradients, buffers and following random numbers of a step."""
    model.zero_grad()
    images, labels = batch()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = model(images)
    F.cross_entropy(out.float(), labels).backward()
    found = {"out": out.detach(), "random": torch.rand(3)}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone().float() for n, b in model.named_buffers()}


@pytest.mark.parametrize("arguments", WHOLE.values(), ids=WHOLE.keys())
def test_equal_to_primitive_by_primitive(
    zoo: ModuleType, passes: list[str], arguments: dict[str, Any]
) -> None:
    first = accelerate(tower(zoo, **arguments))
    second = copy.deepcopy(first)
    got = step(first)
    assert passes.count("forward") == passes.count("backward") == 1
    assert passes.count("draw") == ("rate" in arguments)
    assert passes.count("move_running") == 1
    passes.clear()
    with primitive_by_primitive("cpu"):
        wanted = step(second)
    assert not passes
    assert got.keys() == wanted.keys()
    assert torch.equal(got["random"], wanted["random"])
    for name, tensor in wanted.items():
        close(got[name], tensor, name, 1e-4)
    first.eval()
    second.eval()
    images, _ = batch()
    with torch.no_grad():
        out = first(images)
        assert passes == ["forward"]
        with primitive_by_primitive("cpu"):
            close(out, second(images), "evaluation")


def test_alpha_step_asks_for_no_weights(zoo: ModuleType, passes: list[str]) -> None:
    plain = tower(zoo, rate=0.4)
    plain.requires_grad_(False)
    alphas = [p for n, p in plain.named_parameters() if "alpha" in n]
    assert alphas
    for alpha in alphas:
        alpha.requires_grad_()
    fast = accelerate(copy.deepcopy(plain))
    wanted, got = step(plain), step(fast)
    assert passes.count("backward") == 1
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        close(got[name], tensor, name, 2e-4)


def test_bfloat16_draws_the_same_masks(zoo: ModuleType, passes: list[str]) -> None:
    fast = accelerate(tower(zoo, rate=0.4, C=16))
    twin = copy.deepcopy(fast)
    got = step(fast, torch.bfloat16)
    assert passes.count("draw") == 1
    with primitive_by_primitive("cpu"):
        wanted = step(twin, torch.bfloat16)
    assert torch.equal(got["random"], wanted["random"])
    # Eight bits of mantissa; masked copies are rounded once more.
    close(got["out"].float(), wanted["out"].float(), "output", 0.05)


def test_torch_draws_where_it_draws_otherwise(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, passes: list[str]
) -> None:
    plain = tower(zoo, rate=0.4)
    fast = accelerate(copy.deepcopy(plain))
    wanted = step(copy.deepcopy(fast))
    monkeypatch.setattr(draw, "agrees", lambda library: False)
    got = step(fast)
    assert passes.count("forward") == 2
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
    compare_steps(plain, accelerate(copy.deepcopy(plain)))


def test_repeatable_at_any_number_of_threads(zoo: ModuleType) -> None:
    cell: Any = accelerate(tower(zoo, rate=0.4, C=16)).cells[0]  # type: ignore[index]
    images = [torch.randn(3, channels, 8, 8) for channels in (6, 8)]
    alphas = torch.rand(5, 3)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        twin = copy.deepcopy(cell)
        inputs = [x.clone().requires_grad_() for x in (*images, alphas)]
        out = twin(*inputs)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in (*inputs, *twin.parameters())), *twin.buffers()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_backward_twice(zoo: ModuleType) -> None:
    model = accelerate(tower(zoo, rate=0.4))
    images, labels = batch()
    loss = F.cross_entropy(model(images), labels)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(once, twice, strict=True):
        close(b, 2 * a, "gradient")


OTHERS: dict[str, dict[str, Any]] = {
    "affine": {"affine": True},
    "custom": {"names": ragged},
    "bare-pool": {"names": lambda edge: ("sep_3", "bare_max")},
}


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS.keys())
def test_other_cells_go_primitive_by_primitive(
    zoo: ModuleType, passes: list[str], arguments: dict[str, Any]
) -> None:
    compare_steps(tower(zoo, **arguments), accelerate(tower(zoo, **arguments)))
    assert not passes


def test_dropouts_of_which_some_are_off(zoo: ModuleType, passes: list[str]) -> None:
    plain = tower(zoo, rate=0.4)
    dropouts = [module for module in plain.modules() if isinstance(module, nn.Dropout)]
    dropouts[0].p = 0.0
    compare_steps(plain, accelerate(copy.deepcopy(plain)))
    assert passes.count("forward") == 1, "evaluation alone has no dropout"


def test_factor_is_rounded_as_by_torch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        image = torch.ones(4, 4, dtype=dtype)
        torch.manual_seed(0)
        kept = F.dropout(image, 0.3, training=True).max().item()
        assert whole._factor(0.3, dtype) == kept
