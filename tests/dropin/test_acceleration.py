"""``accelerate`` on whole models: the same numbers, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin_checks import (
    batch,
    calls_of,
    close,
    close_gradients,
    compare_steps,
    is_fused,
    ragged,
    tower,
)
from torch import Tensor, nn

from pdarts_fast.dropin import accelerate, restore
from pdarts_fast.kernels import backends

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]


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
