"""Parameters and multiply-adds against the published figures and against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pdarts_fast.cost import Cost, Scale, count_parameters, genotype_cost, network_cost
from pdarts_fast.genotype import NAMED, PDARTS
from pdarts_fast.network import NetworkCIFAR


@pytest.mark.parametrize(
    ("genotype", "scale", "parameters", "millions"),
    [
        ("PDARTS", "cifar10", 3_433_798, 532.174),
        ("PDARTS", "imagenet", 4_944_352, 542.819),
        ("DARTS_V2", "cifar10", 3_349_342, 528.359),
        ("DARTS_V2", "imagenet", 4_718_752, 529.912),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_networks(genotype: str, scale: str, parameters: int, millions: float) -> None:
    cost = genotype_cost(NAMED[genotype], scale)
    assert cost.parameters == parameters
    assert round(cost.multiply_adds / 1e6, 3) == millions


def test_more_classes_cost_one_row_of_the_classifier_each() -> None:
    ten, hundred = genotype_cost(PDARTS, "cifar10"), genotype_cost(PDARTS, "cifar100")
    features = 4 * 4 * 36
    assert hundred.parameters - ten.parameters == 90 * (features + 1)
    assert hundred.multiply_adds - ten.multiply_adds == 90 * features


def test_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    assert network_cost(network, 8) == Cost(
        parameters=(6 * 9 + 6) + (6 * 5 + 5), multiply_adds=6 * 4 * 4 * 9 + 6 * 5
    )


def test_the_auxiliary_head_is_not_counted() -> None:
    with_head = NetworkCIFAR(4, 10, 3, True, PDARTS)
    without = NetworkCIFAR(4, 10, 3, False, PDARTS)
    assert count_parameters(with_head) == count_parameters(without)
    assert sum(p.numel() for p in with_head.parameters()) > count_parameters(with_head)
    assert network_cost(with_head, 32) == network_cost(without, 32)


def test_counting_leaves_the_network_alone_and_agrees_with_the_genotype() -> None:
    torch.manual_seed(0)
    network = NetworkCIFAR(4, 10, 3, False, PDARTS)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cost = network_cost(network, 32)
    assert cost == genotype_cost(PDARTS, Scale(NetworkCIFAR, 4, 3, 10, 32))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_counting_a_genotype_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    genotype_cost(PDARTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="no scale 'cifar'; choose one of cifar10, cifar100"):
        genotype_cost(PDARTS, "cifar")
