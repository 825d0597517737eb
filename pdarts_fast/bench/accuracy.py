"""How far a backend is from the published graph in float64."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from pdarts_fast.bench import rivals
from pdarts_fast.supernet import Network


def _values(network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
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


def errors(stage: int, batch: int, backend: str) -> dict[str, dict[str, float]]:
    """Largest relative errors against float64, of a backend and of torch's float32.

    Returns:
        By rival: ``logits``, ``loss``, ``input gradient`` (median image), ``weight gradients`` and
        ``alpha gradients`` (worst tensor of each kind).
    """
    made = rivals.make(stage, batch, backend, same_masks=True)
    exact = copy.deepcopy(made[rivals.PUBLISHED].network).double()
    images, labels = made[rivals.PUBLISHED].images, made[rivals.PUBLISHED].labels
    want = _values(exact, images.double(), labels)
    table = {}
    for name in (rivals.PUBLISHED, backend):
        got = _values(made[name].network, images, labels)
        by_image = [_error(g, w) for g, w in zip(got["input"], want["input"], strict=True)]
        alphas = [key for key in want if key.startswith("alphas")]
        rest = [key for key in want if key not in (*alphas, "logits", "loss", "input")]
        table[name] = {
            "logits": _error(got["logits"], want["logits"]),
            "loss": _error(got["loss"], want["loss"]),
            "input gradient": torch.tensor(by_image).median().item(),
            "weight gradients": max(_error(got[key], want[key]) for key in rest),
            "alpha gradients": max(_error(got[key], want[key]) for key in alphas),
        }
    return table
