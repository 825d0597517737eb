"""Running sums of loss and accuracy, kept on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows and columns of the sums that a step adds to.
WEIGHTS, ALPHAS = 0, 1
LOSS, CORRECT, IMAGES = 0, 1, 2


class Averages(NamedTuple):
    """Mean loss and accuracy over some images, or None where there were none."""

    loss: float | None
    accuracy: float | None
    images: int


class Meter:
    """Sums of loss, correct answers and images, kept on the device until they are read.

    Attributes:
        sums: float64 [2, 3], rows WEIGHTS and ALPHAS, columns LOSS, CORRECT and IMAGES.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=device)

    def add(self, row: int, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: its mean loss (scalar), logits [B, classes] and labels int64 [B]."""
        count = labels.shape[0]
        self.sums[row, LOSS] += loss.detach().double() * count
        self.sums[row, CORRECT] += (logits.detach().argmax(1) == labels).sum()
        self.sums[row, IMAGES] += count

    def read(self) -> tuple[Averages, Averages]:
        """Means of both rows; waits for the device."""
        weights, alphas = (_average(row) for row in self.sums.tolist())
        return weights, alphas

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()


def _average(row: list[float]) -> Averages:
    images = int(row[IMAGES])
    if not images:
        return Averages(None, None, 0)
    return Averages(row[LOSS] / images, row[CORRECT] / images, images)
