"""``accelerate`` and the stem of a network: the usual one runs on kernels, others as they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from dropin_checks import batch, close, close_gradients, tower
from torch import Tensor, nn

from pdarts_fast.dropin import accelerate, restore
from pdarts_fast.kernels import backends, stem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not backends.available()["cpu"].usable,
        reason=f"needs backend cpu: {backends.available()['cpu'].reason}",
    ),
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shape of the images of every stem that ran on kernels."""
    found: list[tuple[int, ...]] = []
    own = stem.run

    def counted(backend: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        found.append(tuple(x.shape))
        return own(backend, conv, norm, x)

    monkeypatch.setattr(stem, "run", counted)
    return found


def with_stem(zoo: ModuleType, **convolution: object) -> nn.Module:
    """A network that begins with a convolution from RGB, and BatchNorm, in ``stem[0]``."""
    model = tower(zoo)
    settings = {"kernel_size": 3, "padding": 1, "bias": False, **convolution}
    torch.manual_seed(0)
    begin = nn.Sequential(nn.Conv2d(3, 16, **settings), nn.BatchNorm2d(16))  # type: ignore[arg-type]
    model.stem = nn.Sequential(begin, nn.Conv2d(16, 6, 1))
    return model


def stem_of(model: nn.Module) -> nn.Sequential:
    return model.stem[0]  # type: ignore[index, return-value]


def test_same_numbers_and_names(zoo: ModuleType, runs: list[tuple[int, ...]]) -> None:
    plain = with_stem(zoo)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch()
    for model in (plain, fast):
        model(images).square().sum().backward()
    assert runs == [tuple(images.shape)]
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        close_gradients(q, p, name)
    for (name, b), c in zip(plain.named_buffers(), fast.buffers(), strict=True):
        close(c.float(), b.float(), name)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    assert repr(fast) == repr(plain)
    fast.eval()
    plain.eval()
    close(fast(images), plain(images), "evaluation")


def test_copies_and_pickles(zoo: ModuleType, runs: list[tuple[int, ...]]) -> None:
    fast = accelerate(with_stem(zoo))
    images, _ = batch()
    copy.deepcopy(fast)(images)
    assert len(runs) == 1
    loaded = pickle.loads(pickle.dumps(stem_of(fast)))
    assert type(loaded) is nn.Sequential
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    with_stem(zoo).load_state_dict(torch.load(buffer))
    restore(fast)
    assert type(stem_of(fast)) is nn.Sequential


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "hook-inside": lambda s: s[0].register_forward_hook(lambda m, i, o: o * 2),
    "another-layer": lambda s: s.append(nn.ReLU()),
    "another-eps": lambda s: setattr(s[1], "eps", 0.1),
    "another-momentum": lambda s: setattr(s[1], "momentum", 0.5),
    "another-forward": lambda s: setattr(s[1], "forward", torch.tanh),
    "no-norm": lambda s: s.__setitem__(1, nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_count(
    zoo: ModuleType, runs: list[tuple[int, ...]], change: Callable[[nn.Sequential], object]
) -> None:
    plain = with_stem(zoo)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch()
    for model in (plain, fast):
        change(stem_of(model))
        out = model(images)
        model.out = out.detach()
    assert runs == []
    close(fast.out, plain.out, "output")  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"bias": True}, {"stride": 2}, {"groups": 1, "dilation": 1}])
def test_other_stems(
    zoo: ModuleType, runs: list[tuple[int, ...]], other: dict[str, object]
) -> None:
    usual = "groups" in other
    plain = with_stem(zoo, **other)
    fast = accelerate(copy.deepcopy(plain))
    images, _ = batch()
    close(fast(images), plain(images), "output")
    assert bool(runs) is usual
