"""``accelerate`` when users go on working on the model: hooks, changes, odd calls, log lines."""

from __future__ import annotations

import copy
import logging
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin_checks import batch, calls_of, close, close_gradients, few, is_fused, ragged, tower
from torch import nn

from pdarts_fast.dropin import accelerate, swap
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]


def test_user_edited_alphas_and_frozen_weights(zoo: ModuleType) -> None:
    plain = tower(zoo)
    fast = accelerate(copy.deepcopy(plain))
    images, labels = batch()
    for model in (plain, fast):
        with torch.no_grad():
            model.alphas[0, 1] = 7.0  # type: ignore[index]
            model.alphas.data[2] -= 3.0  # type: ignore[operator,union-attr]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "alphas")
        F.cross_entropy(model(images), labels).backward()
    assert all(p.grad is None for n, p in fast.named_parameters() if n != "alphas")
    close(fast.alphas.grad, plain.alphas.grad, "alphas", 2e-4)  # type: ignore[arg-type]


def test_weights_perturbed_in_place(zoo: ModuleType) -> None:
    """As the finite differences of second-order DARTS do, through ``.data``."""
    plain = tower(zoo)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch()
    for sign in (1, -2):
        outputs = []
        for model in (plain, fast):
            for parameter in model.parameters():
                parameter.data.add_(0.01 * sign)
            outputs.append(model(images))
        close(outputs[1], outputs[0], "output")


def test_hooks_on_model_and_cell_run_fused(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerate(tower(zoo))
    seen = calls_of(monkeypatch)
    fired: list[str] = []
    model.register_forward_hook(lambda *_: fired.append("model"))
    model.cells[0].register_forward_pre_hook(lambda *_: fired.append("cell"))  # type: ignore[index,union-attr,operator]
    model.cells[0].register_full_backward_hook(lambda *_: fired.append("backward"))  # type: ignore[index,union-attr,operator]
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    assert fired == ["cell", "model", "backward"]
    assert seen


def test_hook_inside_a_cell_fires(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget: None
) -> None:
    model = accelerate(tower(zoo))
    seen = calls_of(monkeypatch)
    fired: list[Any] = []
    inner = model.cells[0].edges[1].choices[0]  # type: ignore[index,union-attr]
    handle = inner.register_forward_hook(lambda *_: fired.append(1))  # type: ignore[union-attr,operator]
    images, _ = batch()
    with caplog.at_level(logging.WARNING, "pdarts_fast"):
        model(images)
        model(images)
    assert len(fired) == 2
    assert not seen
    assert [r.message for r in caplog.records] == [
        "SearchCell runs as it is: a hook is registered on a Chain in it"
    ]
    handle.remove()
    model(images)
    assert len(seen) == 1


CHANGES: dict[str, Any] = {
    "another-op": lambda cell: cell.edges[0].choices.__setitem__(0, nn.Tanh()),
    "another-momentum": lambda cell: setattr(last_norm(cell), "momentum", 0.5),
    "another-eps": lambda cell: setattr(last_norm(cell), "eps", 0.1),
    "one-norm-in-evaluation": lambda cell: last_norm(cell).eval(),
    "another-forward": lambda cell: setattr(cell.edges[0].choices[0], "forward", torch.tanh),
    "another-padding-mode": lambda cell: setattr(
        first_convolution(cell), "padding_mode", "circular"
    ),
}


def last_norm(cell: nn.Module) -> nn.Module:
    return [m for m in cell.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def first_convolution(cell: nn.Module) -> nn.Module:
    convolutions = [m for m in cell.edges.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr,operator]
    convolutions[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return convolutions[0]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_after_acceleration_count(zoo: ModuleType, change: Any) -> None:
    plain = tower(zoo)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch()
    fast(images)
    plain(images)
    for model in (plain, fast):
        change(model.cells[0])  # type: ignore[index]
    for _ in range(2):
        close(fast(images), plain(images), "output")
    for (name, b), c in zip(plain.named_buffers(), fast.named_buffers(), strict=True):
        close(c[1].float(), b.float(), name)


def test_dropout_rate_pushed_down(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tower(zoo, rate=0.5)
    fast = accelerate(copy.deepcopy(plain))
    seen = calls_of(monkeypatch)
    images, _ = batch()
    for rate in (0.5, 0.2, 0.0, 0.9):
        outputs = []
        for model in (plain, fast):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
            torch.manual_seed(3)
            outputs.append(model(images))
        close(outputs[1], outputs[0], f"rate {rate}")
    assert len(seen) == 4


def test_dtype_and_odd_calls_fall_back(zoo: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    plain = tower(zoo, reduction=True)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch(1, 8)
    close(
        fast.double()(images.double()).float(), plain.double()(images.double()).float(), "float64"
    )
    fast.float()
    plain.float()
    cell, other = fast.cells[0], plain.cells[0]  # type: ignore[index]
    s0, s1 = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
    weights = torch.rand(5, 3)
    wanted = other(s0, s1, weights)  # type: ignore[operator]
    close(cell(s0, s1, weights=weights), wanted, "keyword")  # type: ignore[operator]
    close(cell(s0, s1, list(weights)), wanted, "list of rows")  # type: ignore[operator]
    with pytest.raises(RuntimeError):
        cell(s0[:, :5], s1, weights)  # type: ignore[operator]


def test_weights_as_a_list_of_vectors(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = zoo.SearchCell(ragged, steps=2, multiplier=2, strict=True)
    fast = accelerate(copy.deepcopy(plain))
    seen = calls_of(monkeypatch)
    s0, s1 = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
    gradients = []
    for cell in (plain, fast):
        torch.manual_seed(0)
        weights = [torch.full((size,), 0.3, requires_grad=True) for size in cell.sizes]
        cell(s0, s1, weights).square().sum().backward()
        gradients.append([w.grad for w in weights])
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        assert got is not None
        assert wanted is not None
        close(got, wanted, "weights", 2e-4)
    assert seen


def test_backward_twice_and_no_grad(zoo: ModuleType) -> None:
    plain = tower(zoo, names=ragged, rate=0.3)
    fast = accelerate(copy.deepcopy(plain))
    images, labels = batch()
    for model in (plain, fast):
        torch.manual_seed(0)
        loss = F.cross_entropy(model(images), labels)
        loss.backward(retain_graph=True)
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        close_gradients(q, p, name)
    with torch.inference_mode():
        assert not fast(images).requires_grad


def test_network_method_new_gives_an_accelerated_one(darts: ModuleType) -> None:
    torch.manual_seed(0)
    model = accelerate(darts.Network(2, 3, 3, nn.CrossEntropyLoss(), 2, 2))
    assert is_fused(model.new())
    assert type(model).__name__ == "Network"
    assert is_fused(copy.deepcopy(model).new())


def test_amp_keeps_outputs_in_float32(zoo: ModuleType) -> None:
    plain = tower(zoo)
    fast = accelerate(copy.deepcopy(plain), amp=True)
    images, labels = batch()
    out = fast(images)
    assert out.dtype == torch.float32
    close(out, plain(images), "output", 5e-2)
    F.cross_entropy(out, labels).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fast.parameters())


def test_what_is_left_is_logged_with_its_name(
    zoo: ModuleType, caplog: pytest.LogCaptureFixture, forget: None
) -> None:
    model = tower(zoo, cells=2)
    model.cells[1] = zoo.HalvedCell(few, steps=2, multiplier=2)  # type: ignore[index,operator]
    with caplog.at_level(logging.INFO, "pdarts_fast"):
        accelerate(model)
    lines = [record.message for record in caplog.records]
    assert (
        "left as it is: cells.1 (HalvedCell): its forward differs from that of the method (output)"
        in lines
    )
    assert "1 of 2 cells of Tower run on backend cpu" in lines
    assert not swap.is_swapped(model.cells[1])  # type: ignore[index]


def test_no_cells_is_one_line(caplog: pytest.LogCaptureFixture, forget: None) -> None:
    with caplog.at_level(logging.INFO, "pdarts_fast"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert [r.message for r in caplog.records] == [
        "Sequential is left as it is: it holds no cells of P-DARTS or DARTS"
    ]


def test_reference_backend_leaves_the_model(zoo: ModuleType) -> None:
    assert not is_fused(accelerate(tower(zoo), backend="reference"))
    model = accelerate(tower(zoo))
    assert not is_fused(accelerate(model, backend="reference"))
    with pytest.raises(UsageError, match="no such backend"):
        accelerate(model, backend="tpu")


def test_torch_compile_calls_the_fused_cell(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tower(zoo).eval()
    fast = accelerate(copy.deepcopy(plain))
    seen = calls_of(monkeypatch)
    images, _ = batch()
    compiled = torch.compile(fast, backend="eager")
    close(compiled(images), plain(images), "output")
    assert seen


def test_own_network_takes_the_backend() -> None:
    from pdarts_fast.supernet import Network

    model = Network(2, 3, 3, nn.CrossEntropyLoss(), backend="reference")
    assert accelerate(model, backend="cpu").backend == "cpu"
    assert type(model) is Network
