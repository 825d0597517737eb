"""The stock modules: names, signatures and behaviour that scripts rely on."""

from __future__ import annotations

import inspect
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pdarts_fast.dropin import genotypes, model, model_search, operations, utils


def test_network_signature() -> None:
    names = list(inspect.signature(model_search.Network).parameters)
    assert names[:10] == [
        *["C", "num_classes", "layers", "criterion", "steps", "multiplier", "stem_multiplier"],
        *["switches_normal", "switches_reduce", "p"],
    ]


def test_network_serves_darts_scripts() -> None:
    np.random.seed(0)
    network = model_search.Network(2, 3, 3, nn.CrossEntropyLoss(), backend="reference")
    with torch.no_grad():
        network.alphas_normal[0, 4] = 5.0
        network.alphas_normal[1, 0] = 9.0
    made = network.new()
    assert type(made) is model_search.Network
    assert torch.equal(made.alphas_normal, network.alphas_normal)
    assert not torch.equal(made.classifier.weight, network.classifier.weight)
    genotype = network.genotype()
    assert genotype.normal[0] == ("sep_conv_3x3", 0)
    assert all(op != "none" for op, _ in genotype.normal + genotype.reduce)
    network.p = 0.3
    network.update_p()


def test_operations_and_genotypes() -> None:
    assert set(genotypes.PRIMITIVES) < set(operations.OPS)
    assert genotypes.PRIMITIVES[0] == "none"
    for name in ("ReLUConvBN", "DilConv", "SepConv", "Identity", "Zero", "FactorizedReduce"):
        assert hasattr(operations, name)
    assert genotypes.Genotype._fields == ("normal", "normal_concat", "reduce", "reduce_concat")
    for name in ("NASNet", "AmoebaNet", "DARTS_V1", "DARTS_V2", "PDARTS"):
        assert isinstance(getattr(genotypes, name), genotypes.Genotype)
    assert model.NetworkCIFAR(2, 3, 3, False, genotypes.PDARTS).drop_path_prob == 0.0
    assert hasattr(model, "NetworkImageNet")


def test_meter_and_accuracy() -> None:
    meter = utils.AvgrageMeter()
    meter.update(2.0, 3)
    meter.update(5.0)
    assert (meter.avg, meter.sum, meter.cnt) == (2.75, 11.0, 4)
    meter.reset()
    assert (meter.avg, meter.sum, meter.cnt) == (0, 0, 0)
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.1, 0.5, 0.4]])
    first, second = utils.accuracy(scores, torch.tensor([1, 1, 2, 0]), topk=(1, 2))
    assert (first.item(), second.item()) == (50.0, 75.0)


@pytest.mark.parametrize("length", [2, 3, 8], ids=lambda length: f"length{length}")
def test_cutout_zeros_one_square(length: int) -> None:
    np.random.seed(3)
    y, x = np.random.randint(6), np.random.randint(5)
    np.random.seed(3)
    image = utils.Cutout(length)(torch.ones(2, 6, 5))
    half = length // 2
    wanted = torch.ones(2, 6, 5)
    wanted[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
    assert torch.equal(image, wanted)


def test_transforms() -> None:
    from PIL import Image

    train, valid = utils._data_transforms_cifar10(Namespace(cutout=True, cutout_length=16))
    image = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    np.random.seed(0)
    assert train(image).shape == valid(image).shape == (3, 32, 32)
    assert (train(image) == 0).any()
    plain, _ = utils._data_transforms_cifar100(Namespace(cutout=False))
    assert not any(isinstance(step, utils.Cutout) for step in plain.transforms)


def test_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "exp"
    utils.create_exp_dir(str(folder), scripts_to_save=[__file__])
    utils.create_exp_dir(str(folder))
    assert f"Experiment dir : {folder}" in capsys.readouterr().out
    assert (folder / "scripts" / Path(__file__).name).is_file()
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    utils.save(first, str(folder / "weights.pt"))
    utils.load(second, str(folder / "weights.pt"))
    assert torch.equal(first.weight, second.weight)
    utils.save_checkpoint({"epoch": 3}, True, str(folder))
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert torch.load(folder / name)["epoch"] == 3


def test_count_parameters_leaves_out_auxiliary_heads() -> None:
    network = nn.ModuleDict({"body": nn.Linear(9, 10), "auxiliary_head": nn.Linear(5, 5)})
    assert utils.count_parameters_in_MB(network) == pytest.approx(100 / 1e6)


def test_drop_path() -> None:
    x = torch.ones(400, 2, 3, 3)
    assert utils.drop_path(x, 0.0) is x
    torch.manual_seed(0)
    dropped = utils.drop_path(x, 0.25)
    values = dropped[:, 0, 0, 0]
    assert torch.equal(dropped, values[:, None, None, None].expand_as(x))
    assert set(values.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 0.15 < (values == 0).float().mean() < 0.35
