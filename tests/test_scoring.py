"""Scores against counting by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdarts_fast.scoring import score

pytestmark = pytest.mark.usefixtures("one_thread")


class Batches:
    """Images whose first pixels are the logits to give."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def __len__(self) -> int:
        return -(-len(self.labels) // 4)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.logits.split(4), self.labels.split(4), strict=True)


class Echo(nn.Module):
    """Gives its input as logits, and notes whether it is in training mode."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        assert not self.training
        return x[:, :, 0, 0], None


@pytest.mark.parametrize("classes", [3, 7], ids=["fewer than 5 classes", "more than 5"])
def test_scores_by_hand(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, classes, 1, 1, generator=generator)
    labels = torch.randint(classes, (10,), generator=generator)
    network = Echo().train()
    found = score(network, Batches(logits, labels), classes)
    flat = logits[:, :, 0, 0]
    answers = flat.argmax(1)
    ranks = (flat > flat.gather(1, labels[:, None])).sum(1)
    assert found.images == 10
    assert found.loss == pytest.approx(functional.cross_entropy(flat, labels).item())
    assert found.accuracy == (answers == labels).double().mean().item()
    assert found.top5_accuracy == (ranks < 5).double().mean().item()
    for true in range(classes):
        for answer in range(classes):
            count = int(((labels == true) & (answers == answer)).sum())
            assert found.confusion[true, answer] == count
    assert network.training


def test_a_callback_may_stop_it_and_the_mode_comes_back() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    network = Echo().train()
    batches = Batches(torch.zeros(5, 3, 1, 1), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(KeyboardInterrupt):
        score(network, batches, 3, each_batch=stop)
    assert network.training
