"""P-DARTS as a strategy is the plain search, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pdarts_fast.alphas import load_alphas
from pdarts_fast.config import SearchConfig
from pdarts_fast.data import Augmentation, Dataset, ResidentLoader, split_indices
from pdarts_fast.search_space import CELL_TYPES, all_switches, drop_ops
from pdarts_fast.supernet import Network

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("tiny_search_alphas_*.json"))
# What the golden alphas were computed on: other kernels round differently.
RECORDED_ON = ("2.14", "AVX512")
CPU = torch.device("cpu")


@pytest.mark.skipif(
    (torch.__version__[:4], torch.backends.cpu.get_cpu_capability()) != RECORDED_ON,
    reason=f"the alphas were recorded with torch {RECORDED_ON[0]} on {RECORDED_ON[1]}; "
    "test_a_search_is_the_loop_written_out has the same claim on every machine",
)
def test_a_tiny_search_gives_the_alphas_of_before_the_strategies(
    processes: Any, tiny: Any, tmp_path: Path
) -> None:
    """The numbers are those of the program when P-DARTS was its only search."""
    process = processes.run(tiny(tmp_path / "run", "--batch-size", 13), toy=False)
    assert process.status == 0, process.stderr
    # On processors of AMD and of Intel the program of that time differs by 2e-9.
    found = (tmp_path / "run" / "alphas.json").read_bytes()
    assert found in [file.read_bytes() for file in GOLDEN]


def loader(
    dataset: Dataset, config: SearchConfig, indices: np.ndarray, stream: str
) -> ResidentLoader:
    return ResidentLoader(
        dataset.train, indices, batch_size=config.batch_size,
        augmentation=Augmentation(config.crop_padding, config.flip, config.cutout),
        mean=dataset.mean, std=dataset.std, seed=config.seed, stream=stream, shuffle=True,
        device=CPU,
    )  # fmt: skip


def descend(loss: torch.Tensor, parameters: list[Any], optimizer: Any) -> None:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()


def search_written_out(config: SearchConfig, dataset: Dataset) -> list[dict[str, np.ndarray]]:
    """Three stages of P-DARTS as a plain loop: final alphas of every stage."""
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    switches, finished = all_switches(), []
    halves = split_indices(len(dataset.train), 0.5)
    for stage in range(3):
        network = Network(
            2, 10, config.cells[stage], nn.CrossEntropyLoss(),
            switches_normal=switches["normal"], switches_reduce=switches["reduce"],
            p=config.skip_dropout[stage], backend="reference",
        )  # fmt: skip
        weights, alphas = network.weight_parameters(), network.arch_parameters()
        sgd = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4)
        adam = torch.optim.Adam(alphas, config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
        first = loader(dataset, config, halves[0], f"stage{stage}-weights")
        second = loader(dataset, config, halves[1], f"stage{stage}-alphas")
        for epoch in range(2):
            p = config.skip_dropout[stage]
            network.p = p * (1 - epoch) / 2 if epoch == 0 else p
            network.update_p()
            sgd.param_groups[0]["lr"] = 0.025 * (1 + np.cos(np.pi * epoch / 2)) / 2
            alpha_batches = second.epoch(0) if epoch == 1 else None
            for images, labels in first.epoch(epoch):
                if alpha_batches is not None:
                    batch, wanted = next(alpha_batches)
                    descend(nn.functional.cross_entropy(network(batch), wanted), alphas, adam)
                descend(nn.functional.cross_entropy(network(images), labels), weights, sgd)
        normal, reduce = (table.detach().numpy().copy() for table in alphas)
        finished.append({"normal": normal, "reduce": reduce})
        if stage < 2:
            switches = drop_ops(switches, finished[-1], [3, 2][stage])
    return finished


@pytest.mark.usefixtures("one_thread")
def test_a_search_is_the_loop_written_out(finished: Any, tools: Any) -> None:
    run = finished("--backend", "reference")
    saved = json.loads((run / "config.json").read_text())["config"]
    config = tools.settings("--config", run / "config.json")
    wanted = search_written_out(config, tools.few_digits(config.image_size))
    assert saved["strategy"] == "pdarts"
    for stage, alphas in zip(load_alphas(run), wanted, strict=True):
        for kind in CELL_TYPES:
            np.testing.assert_array_equal(stage[kind], alphas[kind])
    assert not tools.records(run, "cost")
    assert not (run / "costs.json").exists()
