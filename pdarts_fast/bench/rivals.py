"""Networks of a stage that do the same work: the published graph and the fused cells."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdarts_fast.config import SearchConfig
from pdarts_fast.skip_dropout import SkipDropout
from pdarts_fast.step import SearchStep
from pdarts_fast.supernet import Network

CELLS = {1: 5, 2: 11, 3: 17}
LIVE = {1: 8, 2: 5, 3: 3}
PUBLISHED, PUBLISHED_LAST = "published", "published channels-last"


def switch_tables(stage: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tables, bool ``[14, 8]``, with as many live primitives as a stage has."""
    rng = np.random.default_rng(seed)
    tables = np.zeros((2, 14, 8), dtype=bool)
    for row in tables.reshape(-1, 8):
        row[rng.choice(8, LIVE[stage], replace=False)] = True
    return tables[0], tables[1]


def network(stage: int, backend: str, channels: int = 16, *, dropout: bool = False) -> Network:
    """The supernet of a CIFAR-10 stage, always with the same weights.

    Args:
        stage: 1 to 3.
        backend: What runs its cells.
        channels: C of the first cell.
        dropout: With the skip dropout that the stage begins with.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    normal, reduce = switch_tables(stage)
    return Network(
        channels,
        10,
        CELLS[stage],
        F.cross_entropy,
        switches_normal=normal,
        switches_reduce=reduce,
        p=SearchConfig().skip_dropout[stage - 1] if dropout else 0.0,
        backend=backend,
    )


def with_torch_dropout(network: Network) -> Network:
    """The same network with torch's dropout behind its skips, as the published graph has it."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, SkipDropout):
                setattr(module, name, nn.Dropout(network.p))
    return network


@dataclass
class Rival:
    """A network with its input in its layout.

    Attributes:
        amp: Autocast to bfloat16.
    """

    network: Network
    images: Tensor
    labels: Tensor
    amp: bool = False

    def __post_init__(self) -> None:
        # Once: walking through all modules takes as long as a cell's backward pass.
        self._parameters = list(self.network.parameters())

    def loss(self) -> Tensor:
        """Mean cross-entropy of the batch."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.amp):
            logits = self.network(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def forward_backward(self) -> None:
        """One pass that computes every gradient."""
        for parameter in self._parameters:
            parameter.grad = None
        self.loss().backward()


def make(
    stage: int, batch: int, backend: str, *, published: bool = True, same_masks: bool = False
) -> dict[str, Rival]:
    """The rivals of a stage by name, on CIFAR-sized noise.

    Args:
        stage: 1 to 3.
        batch: Images.
        backend: The fused one.
        published: With the published graph.
        same_masks: The published graph gets this program's skip dropout, so that results compare.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.arange(batch) % 10
    last = images.to(memory_format=torch.channels_last)
    rivals: dict[str, Rival] = {}
    if published:
        plain = network(stage, "reference", dropout=True)
        if not same_masks:
            plain = with_torch_dropout(plain)
        channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        rivals[PUBLISHED] = Rival(plain, images, labels)
        rivals[PUBLISHED_LAST] = Rival(channels_last, last, labels)
    fused = network(stage, backend, dropout=True)
    rivals[backend] = Rival(fused, last, labels)
    rivals[f"{backend} amp"] = Rival(copy.deepcopy(fused), last, labels, amp=True)
    return rivals


def published_bilevel(rival: Rival, config: SearchConfig) -> Callable[[], None]:
    """The published procedure: both steps compute all gradients, one optimiser uses its half."""
    net = rival.network
    weights, alphas = net.weight_parameters(), net.arch_parameters()
    optimizers = [
        torch.optim.Adam(alphas, config.alpha_lr, config.alpha_betas, weight_decay=1e-3),
        torch.optim.SGD(weights, config.lr, config.momentum, weight_decay=config.weight_decay),
    ]

    def step() -> None:
        for parameters, optimizer in zip((alphas, weights), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            rival.loss().backward()
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()

    return step


def own_steps(rival: Rival, config: SearchConfig) -> tuple[Callable[[], None], Callable[[], None]]:
    """This program's alpha step and weight step, in the precision of the rival."""
    config = dataclasses.replace(config, amp=rival.amp)
    step = SearchStep(rival.network, config, torch.device("cpu"))
    return (
        lambda: step.alpha_step(rival.images, rival.labels, 0),
        lambda: step.weight_step(rival.images, rival.labels, 0),
    )
