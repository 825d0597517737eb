"""A digits search on the published graph and on the fused cells: the same search.

In float64 the two agree to rounding from the first step to the genotype. In float32 no two orders
of additions do for long: some activations lie within rounding of zero, a ReLU or a maximum falls
the other way, and the gradient of that image changes by a finite amount. The published graph is as
far from float64 as the fused cells are, which is what can be asked of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pdarts_fast.alphas import load_alphas
from pdarts_fast.config import SearchConfig, preset, validate
from pdarts_fast.data import Augmentation, ResidentLoader, load_dataset, split_indices
from pdarts_fast.genotype import load_genotype
from pdarts_fast.kernels.cpu import load as cpu_load
from pdarts_fast.run.directory import RunDirectory
from pdarts_fast.run.setup import make_display
from pdarts_fast.run.signals import StopRequest
from pdarts_fast.search import Search
from pdarts_fast.search_space import all_switches
from pdarts_fast.step import SearchStep
from pdarts_fast.strategies.base import Strategy
from pdarts_fast.supernet import Network

pytestmark = pytest.mark.skipif(
    not cpu_load.availability().usable, reason=cpu_load.availability().reason
)


def tiny(backend: str, run: Path) -> SearchConfig:
    """The demo search with 4 channels on digits of their own size, batches of 240."""
    return validate(
        replace(
            preset("demo"),
            image_size=8,
            channels=(4, 4, 4),
            cells=(3, 3, 3),
            batch_size=240,
            epochs=2,
            warmup_epochs=1,
            backend=backend,
            run_dir=run,
        )
    )


def dataset(config: SearchConfig):
    return load_dataset(
        config.dataset,
        config.data,
        image_size=config.image_size,
        download=False,
        checksum=True,
        workers=1,
        skip_broken=False,
    )


class DoubleLoader(ResidentLoader):
    """The same batches as float64."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in super().epoch(epoch, start):
            yield images.double(), labels


def search(backend: str, folder: Path) -> tuple[list[dict[str, np.ndarray]], object]:
    """Alphas at the end of every stage and the genotype of a search."""
    config = tiny(backend, folder / backend)
    run = RunDirectory(config.run_dir, resume=False, overwrite=False)
    display = make_display()
    try:
        device = torch.device("cpu")
        made = Search(config, dataset(config), run, device, display, Strategy(config, device))
        with StopRequest() as stop:
            made.run(stop)
    finally:
        display.close()
        run.close()
    return load_alphas(config.run_dir / "alphas.json"), load_genotype(config.run_dir)


def test_a_float64_search_is_the_same_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdarts_fast.data.choose.ResidentLoader", DoubleLoader)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        published, fused = (search(backend, tmp_path) for backend in ("reference", "cpu"))
    finally:
        torch.set_default_dtype(default)
    assert published[1] == fused[1]
    for stage, (left, right) in enumerate(zip(published[0], fused[0], strict=True)):
        for kind in ("normal", "reduce"):
            # The files hold float32.
            np.testing.assert_allclose(left[kind], right[kind], atol=1e-6, err_msg=str(stage))


def trajectory(backend: str, dtype: torch.dtype, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and alphas, float64 vectors, after every bilevel step on digits."""
    config = tiny(backend, Path("unused"))
    data = dataset(config)
    torch.manual_seed(0)
    np.random.seed(0)
    switches = all_switches()
    network = Network(
        8,
        10,
        3,
        torch.nn.CrossEntropyLoss(),
        switches_normal=switches["normal"],
        switches_reduce=switches["reduce"],
        backend=backend,
    ).to(dtype)
    network.train()
    step = SearchStep(network, config, torch.device("cpu"))
    step.set_epoch(config.lr, 0.0)
    halves = [
        ResidentLoader(
            data.train,
            indices,
            batch_size=48,
            augmentation=Augmentation(config.crop_padding, config.flip, config.cutout),
            mean=data.mean,
            std=data.std,
            seed=0,
            stream=name,
            shuffle=True,
            device=torch.device("cpu"),
        ).epoch(0)
        for name, indices in zip(("w", "a"), split_indices(len(data.train), 0.5), strict=True)
    ]
    weights, alphas = [], []
    for number, (batch, other) in zip(range(steps), zip(*halves, strict=True), strict=False):
        step.alpha_step(other[0].to(dtype), other[1], number)
        step.weight_step(batch[0].to(dtype), batch[1], number)
        weights.append(torch.cat([p.detach().double().flatten() for p in step.weights]))
        alphas.append(torch.cat([p.detach().double().flatten() for p in step.alphas]))
    return weights, alphas


def test_float32_is_as_close_to_float64_as_the_published_graph() -> None:
    exact = trajectory("reference", torch.float64, 12)
    published = trajectory("reference", torch.float32, 12)
    fused = trajectory("cpu", torch.float32, 12)
    for name, truth, theirs, ours in zip(
        ("weights", "alphas"), exact, published, fused, strict=True
    ):

        def distance(found: list[Tensor], truth: list[Tensor] = truth) -> list[float]:
            return [float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)]

        # Which activations flip is chance, so a factor; nobody may drift away by itself.
        assert max(distance(ours)) <= 3 * max(distance(theirs)), name
        assert distance(ours)[0] <= 3 * max(distance(theirs)[0], 1e-6), name
