"""The stem differentiated from its output gives the gradients of the stem."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pdarts_fast import stem


def make(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    modules = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
    with torch.no_grad():
        modules[1].weight.normal_().mul_(scale)
        modules[1].bias.normal_().mul_(0.5 * modules[1].weight.abs())
    return modules


def gradients(modules: nn.Sequential, *, fused: bool) -> list[torch.Tensor]:
    x = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    out = stem.run(modules, x, fused=fused)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    norm = modules[1]
    found = [parameter.grad for parameter in modules.parameters()]
    assert all(grad is not None for grad in found)
    counters = [norm.running_mean, norm.running_var, norm.num_batches_tracked.float()]
    return [out.detach(), *found, *counters]  # type: ignore[list-item]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9], ids=["usual", "small", "tiny"])
def test_gradients_are_those_of_the_stem(scale: float) -> None:
    modules = make(scale)
    wanted = gradients(copy.deepcopy(modules), fused=False)
    for left, right in zip(gradients(modules, fused=True), wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 1e-9], ids=["usual", "tiny"])
def test_the_input_is_kept_only_where_the_output_does_not_tell_it(scale: float) -> None:
    modules, kept = make(scale), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        out = stem.run(modules, torch.randn(4, 3, 9, 7), fused=True)
    large = {x.data_ptr() for x in kept if x.numel() == out.numel()}
    assert large == {out.data_ptr()} if scale == 1 else out.data_ptr() not in large


@pytest.mark.parametrize("what", ["evaluation", "hook", "no-gradient"])
def test_anything_else_is_the_stem_itself(what: str) -> None:
    modules, calls = make(), []
    if what == "evaluation":
        modules.eval()
    if what == "hook":
        modules[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(what != "no-gradient"):
        out = stem.run(modules, torch.randn(2, 3, 8, 8), fused=True)
    assert len(calls) == (what == "hook")
    assert "FromOutput" not in str(out.grad_fn)


def test_a_scale_changed_before_the_backward_pass_is_noticed() -> None:
    modules = make()
    out = stem.run(modules, torch.randn(2, 3, 8, 8), fused=True)
    with torch.no_grad():
        modules[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
