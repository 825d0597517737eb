"""``accelerate`` on whole models: the same numbers, and nothing else changes."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.dropin import accelerate, restore, swap
from pdarts_fast.errors import UsageError
from pdarts_fast.kernels import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]

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


KINDS: dict[str, dict[str, Any]] = {
    "few-ops": {},
    "reduction": {"reduction": True},
    "padded-channels": {"C": 5, "reduction": True},
    "three-steps-one-out": {"steps": 3, "multiplier": 1},
    "skip-dropout": {"rate": 0.4},
    "affine": {"affine": True},
    "ragged-with-custom": {"names": ragged},
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS.keys())
def test_training_and_evaluation_are_the_same(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    model = tower(zoo, **arguments)
    fast = accelerate(copy.deepcopy(model))
    seen = calls_of(monkeypatch)
    compare_steps(model, fast)
    assert len(seen) == 3, "the fused cell did not run"


def test_derived_network(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("skip", 0), ("dil_3", 1), ("sep_3", 1), ("max_pool", 2)]

    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.widen = nn.Conv2d(6, 8, 1)
            self.cells = nn.ModuleList([zoo.DerivedCell(pairs, [2, 3])])
            self.head = nn.Linear(8, 3)
            self.drop_path_prob = 0.2

        def forward(self, x: Tensor) -> Tensor:
            s0 = self.stem(x)
            out = self.cells[0](s0, self.widen(s0), self.drop_path_prob)
            return self.head(out.mean((2, 3)))

    torch.manual_seed(0)
    model = Derived()
    fast = accelerate(copy.deepcopy(model))
    seen = calls_of(monkeypatch)
    compare_steps(model, fast)
    assert len(seen) == 3


def test_names_parameters_and_state_stay(zoo: ModuleType) -> None:
    model = tower(zoo)
    names = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    parameters = list(model.parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shown = repr(model)
    fast = accelerate(model)
    assert fast is model
    assert [name for name, _ in fast.named_parameters()] == names
    assert [name for name, _ in fast.named_modules()] == modules
    assert all(p is q for p, q in zip(fast.parameters(), parameters, strict=True))
    assert fast.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fast.state_dict().items())
    assert repr(fast) == shown
    assert type(fast.cells[0]).__name__ == "SearchCell"  # type: ignore[index]
    assert isinstance(fast.cells[0], zoo.SearchCell)  # type: ignore[index]


def test_checkpoints_go_both_ways(zoo: ModuleType, tmp_path: Path) -> None:
    plain, fast = tower(zoo), accelerate(tower(zoo))
    images, labels = batch()
    for source, target in ((plain, fast), (fast, plain)):
        F.cross_entropy(source(images), labels).backward()
        torch.optim.SGD(source.parameters(), 0.1).step()
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt"))
        target.train()
        source.train()
        close(target(images), source(images), "output")


def test_deep_copy_is_accelerated_and_independent(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerate(tower(zoo))
    twin = copy.deepcopy(model)
    seen = calls_of(monkeypatch)
    images, labels = batch()
    before = model(images).detach()
    close(twin(images), before, "copy")
    assert len(seen) == 2
    F.cross_entropy(twin(images), labels).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    close(model(images), before, "original after the copy changed")
    restore(twin)
    restore(model)
    assert not is_fused(twin)


@pytest.mark.parametrize("whole", ["pickle", "torch.save"])
def test_pickled_model_is_one_of_its_own_class(zoo: ModuleType, whole: str) -> None:
    model = accelerate(tower(zoo))
    images, _ = batch()
    wanted = model.eval()(images)
    if whole == "pickle":
        data = pickle.dumps(model)
        assert b"pdarts_fast" not in data
        loaded = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert type(loaded.cells[0]) is zoo.SearchCell
    close(loaded(images), wanted, "output")
    assert is_fused(model)
    assert is_fused(accelerate(loaded))


def test_data_parallel_around_it(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tower(zoo)
    fast = nn.DataParallel(accelerate(copy.deepcopy(plain)))
    seen = calls_of(monkeypatch)
    compare_steps(nn.DataParallel(plain), fast)
    assert seen
    wrapped = accelerate(nn.DataParallel(tower(zoo)))
    assert is_fused(wrapped.module)


def replicate(module: nn.Module) -> nn.Module:
    """What ``DataParallel`` makes for another device, on this one."""
    originals = list(module.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in originals}
    for original in originals:
        twin = copies[id(original)]
        twin._former_parameters = {}  # type: ignore[assignment]
        for name, child in original._modules.items():
            setattr(twin, name, copies[id(child)])
        for name, parameter in original._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                passed = parameter * 1.0
                setattr(twin, name, passed)
                twin._former_parameters[name] = passed  # type: ignore[operator,index]
    return copies[id(module)]


def test_replica_of_data_parallel(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tower(zoo, names=ragged)
    fast = accelerate(copy.deepcopy(plain))
    images, labels = batch()
    seen = calls_of(monkeypatch)
    for model in (plain, fast):
        torch.manual_seed(0)
        F.cross_entropy(replicate(model)(images), labels).backward()
    assert len(seen) == 1
    for (name, p), q in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        close_gradients(q[1], p, name)


def test_distributed_data_parallel(zoo: ModuleType, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        plain = tower(zoo)
        fast = accelerate(copy.deepcopy(plain))
        images, labels = batch()
        for model in (plain, nn.parallel.DistributedDataParallel(fast)):
            F.cross_entropy(model(images), labels).backward()
        for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
            close_gradients(q, p, name)
    finally:
        torch.distributed.destroy_process_group()


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
    "another-stride": lambda cell: setattr(first_convolution(cell), "padding_mode", "circular"),
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
