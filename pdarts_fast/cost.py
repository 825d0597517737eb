"""Size of a network: parameters and multiply-adds of one image, without running any arithmetic.

Multiply-adds are those of convolutions and linear layers, biases not counted; an auxiliary head
counts neither way, because evaluation does not run it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pdarts_fast.genotype import Genotype
from pdarts_fast.network import NetworkCIFAR, NetworkImageNet

AUXILIARY_PREFIX = "auxiliary_head."


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Number of trained values.
        multiply_adds: Multiply-adds of the forward pass of one image.
    """

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Scale:
    """How a genotype becomes a network.

    Attributes:
        network: The network class.
        C: Channels of the first cell's nodes.
        layers: Number of cells.
        num_classes: Size of the output.
        image_size: Side of the square images, pixels.
    """

    network: type[NetworkCIFAR] | type[NetworkImageNet]
    C: int
    layers: int
    num_classes: int
    image_size: int

    def build(self, genotype: Genotype, device: str | torch.device) -> nn.Module:
        """The network of a genotype, without auxiliary head, on a device."""
        with torch.device(device):
            return self.network(self.C, self.num_classes, self.layers, False, genotype)


SCALES = {
    "cifar10": Scale(NetworkCIFAR, C=36, layers=20, num_classes=10, image_size=32),
    "cifar100": Scale(NetworkCIFAR, C=36, layers=20, num_classes=100, image_size=32),
    "imagenet": Scale(NetworkImageNet, C=48, layers=14, num_classes=1000, image_size=224),
}
"""The evaluation networks of the paper. Source: arXiv 1904.12760, sections 4.2 and 4.3."""


def count_parameters(network: nn.Module) -> int:
    """Trained values of a network without its auxiliary head."""
    return sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if not name.startswith(AUXILIARY_PREFIX)
    )


def network_cost(network: nn.Module, image_size: int) -> Cost:
    """Cost of a network; the network itself is neither run nor changed.

    Args:
        network: Any network of images ``[N, 3, image_size, image_size]``.
        image_size: Side of the square images, pixels.
    """
    return _trace(copy.deepcopy(network).to("meta"), image_size)


def genotype_cost(genotype: Genotype, scale: Scale | str = "cifar10") -> Cost:
    """Cost of the network that a genotype becomes at a scale.

    Args:
        genotype: The two cells.
        scale: A scale or the name of one in ``SCALES``.

    Raises:
        ValueError: No scale has this name, or the genotype is not valid.
    """
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(f"no scale {scale!r}; choose one of {', '.join(SCALES)}")
        scale = SCALES[scale]
    return _trace(scale.build(genotype, "meta"), scale.image_size)


def _trace(network: nn.Module, image_size: int) -> Cost:
    """Counts while one image passes through a network on the meta device."""
    return trace(network, torch.empty((1, 3, image_size, image_size), device="meta"))[0]


LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.MaxPool2d, nn.Linear)
"""Modules whose outputs count as activations."""


def trace(network: nn.Module, inputs: Tensor) -> tuple[Cost, int]:
    """Counts while some input passes through a module; both lie on the meta device.

    Returns:
        The cost, and the number of values that the ``LAYERS`` of the module put out.
    """
    multiply_adds = activations = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal multiply_adds, activations
        activations += output.numel()
        if isinstance(module, nn.Conv2d):
            multiply_adds += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            multiply_adds += output.numel() * module.in_features

    network.eval()
    layers = [module for module in network.modules() if isinstance(module, LAYERS)]
    handles = [module.register_forward_hook(count) for module in layers]
    with torch.no_grad():
        network(inputs)
    for handle in handles:
        handle.remove()
    return Cost(count_parameters(network), multiply_adds), activations
