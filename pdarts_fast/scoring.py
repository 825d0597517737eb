"""How well a network classifies: loss, top-1 and top-5 accuracy, confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdarts_fast.data import Loader
from pdarts_fast.precision import precision_on

LARGEST_K = 5


@dataclass(frozen=True)
class Scores:
    """Results over a set of images.

    Attributes:
        loss: Mean cross-entropy in nats.
        accuracy: Share of images whose highest score is that of their class, 0 to 1.
        top5_accuracy: Share whose class is among the 5 highest scores (all, of fewer classes).
        images: Number of images.
        confusion: int64 [classes, classes] on the CPU; row: true class, column: answer.
    """

    loss: float
    accuracy: float
    top5_accuracy: float
    images: int
    confusion: Tensor


@torch.inference_mode()
def score(
    network: nn.Module,
    loader: Loader,
    num_classes: int,
    *,
    amp: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    each_batch: Callable[[], None] = lambda: None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Scores:
    """Evaluate a derived network; its training mode and weights stay as they were.

    Args:
        network: Gives (logits [B, classes], anything).
        loader: Images and labels on the network's device; one pass is made.
        num_classes: Columns of the logits.
        amp: Mixed precision, as `precision.precision_on` has it.
        memory_format: Memory order of the images.
        each_batch: Called after each batch, for progress; may raise to stop.
        total: Adds sums over the processes that share the images of the loader.
    """
    training = network.training
    network.eval()
    try:
        return _score(network, loader, num_classes, amp, memory_format, each_batch, total)
    finally:
        network.train(training)


def _score(
    network: nn.Module,
    loader: Loader,
    num_classes: int,
    amp: bool,
    memory_format: torch.memory_format,
    each_batch: Callable[[], None],
    total: Callable[[Tensor], Tensor],
) -> Scores:
    sums: Tensor | None = None  # loss and correct answers among the first 1 and 5, float64 [3]
    confusion: Tensor | None = None
    for images, labels in loader.epoch(0):
        with precision_on(images.device, amp).autocast(images.device):
            logits = network(images.contiguous(memory_format=memory_format))[0]
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        ranked = logits.topk(min(LARGEST_K, num_classes), dim=1).indices
        hits = ranked == labels[:, None]
        batch = torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
        places = labels * num_classes + ranked[:, 0]
        counts = torch.bincount(places, minlength=num_classes**2)
        sums = batch if sums is None else sums + batch
        confusion = counts if confusion is None else confusion + counts
        each_batch()
    assert sums is not None
    assert confusion is not None
    loss_sum, first, five = total(sums).tolist()
    matrix = total(confusion).view(num_classes, num_classes).cpu()
    # Not the loader's number: files that could not be read were left out.
    count = int(matrix.sum())
    return Scores(loss_sum / count, first / count, five / count, count, matrix)
