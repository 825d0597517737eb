"""How far a backend is from the published graph in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdarts_fast.bench import decisions, rivals
from pdarts_fast.supernet import Network


def values(network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``logits``, ``loss``, ``input`` (its gradient) and every parameter's gradient, float64."""
    x = images.clone().requires_grad_()
    network.zero_grad(set_to_none=True)
    logits = network(x)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    assert x.grad is not None
    found = {"logits": logits.detach(), "loss": loss.detach(), "input": x.grad}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return {name: value.double() for name, value in found.items()}


def _error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


def _compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    by_image = [_error(g, w) for g, w in zip(got["input"], want["input"], strict=True)]
    alphas = [key for key in want if key.startswith("alphas")]
    rest = [key for key in want if key not in (*alphas, "logits", "loss", "input")]
    return {
        "logits": _error(got["logits"], want["logits"]),
        "loss": _error(got["loss"], want["loss"]),
        "input gradient": torch.tensor(by_image).median().item(),
        "weight gradients": max(_error(got[key], want[key]) for key in rest),
        "alpha gradients": max(_error(got[key], want[key]) for key in alphas),
    }


def errors(stage: int, batch: int, backend: str) -> dict[str, dict[str, Any]]:
    """Largest relative errors against float64, of a backend and of torch's float32.

    Returns:
        By rival: ``flips``, how many ReLUs and maximum pools take another side than in float64;
        ``rounding``, errors against the float64 graph that takes the rival's sides; ``plain``,
        those against the float64 graph as it is. Errors: ``logits``, ``loss``, ``input gradient``
        (median image), ``weight gradients`` and ``alpha gradients`` (worst tensor of each kind).
    """
    made = rivals.make(stage, batch, backend, same_masks=True)
    images, labels = made[rivals.PUBLISHED].images, made[rivals.PUBLISHED].labels
    published, own = made[rivals.PUBLISHED].network, made[backend].network
    exact, again = copy.deepcopy(published).double(), copy.deepcopy(own)
    got = {backend: values(own, images, labels)}
    with decisions.of_fused(again, backend) as of_own, torch.no_grad():
        again(images)
    with decisions.of_published(published) as of_published:
        got[rivals.PUBLISHED] = values(published, images, labels)
    fresh = copy.deepcopy(exact)
    with decisions.of_published(exact) as of_exact:
        want = values(exact, images.double(), labels)
    table = {}
    for name, sides in ((rivals.PUBLISHED, of_published), (backend, of_own)):
        same = decisions.imposed(fresh, sides)
        table[name] = {
            "flips": decisions.differing(sides, of_exact),
            "rounding": _compare(got[name], values(same, images.double(), labels)),
            "plain": _compare(got[name], want),
        }
    return table
