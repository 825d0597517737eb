"""The stock module ``utils``: meters, accuracy, transforms, saving, drop-path."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pdarts_fast import network

__all__ = [
    "AvgrageMeter",
    "Cutout",
    "_data_transforms_cifar10",
    "_data_transforms_cifar100",
    "accuracy",
    "count_parameters_in_MB",
    "create_exp_dir",
    "drop_path",
    "load",
    "save",
    "save_checkpoint",
]

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"


class AvgrageMeter:
    """A running mean; the name is spelled as scripts spell it.

    Attributes:
        avg: Mean so far.
        sum: Sum of value times count.
        cnt: Sum of counts.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.avg = 0.0
        self.sum = 0.0
        self.cnt = 0

    def update(self, val: float, n: int = 1) -> None:
        """Adds the mean ``val`` of ``n`` samples."""
        self.sum += val * n
        self.cnt += n
        self.avg = self.sum / self.cnt


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of samples whose label is among the k best scores, a 0-dim tensor for each k.

    Args:
        output: Scores ``[N, classes]``.
        target: Labels ``[N]``.
        topk: The values of k.
    """
    best = output.topk(max(topk), dim=1).indices
    hits = best.eq(target.reshape(-1, 1))
    return [hits[:, :k].float().sum() * (100.0 / target.size(0)) for k in topk]


class Cutout:
    """Zeros a square of an image ``[C, H, W]`` in place; its centre comes from numpy's generator.

    The square is cut off at the border of the image.

    Args:
        length: Side in pixels.

    Source: arXiv 1708.04552, section 3.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, img: Tensor) -> Tensor:
        height, width = img.shape[-2:]
        centre = np.random.randint(height), np.random.randint(width)
        rows, columns = (
            slice(max(at - self.length // 2, 0), min(at + self.length // 2, side))
            for at, side in zip(centre, (height, width), strict=True)
        )
        img[..., rows, columns] = 0
        return img


def _transforms(args: Any, mean: Iterable[float], std: Iterable[float]) -> tuple[Any, Any]:
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize(tuple(mean), tuple(std))]
    train: list[Callable[..., Any]] = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        *last,
    ]
    if args.cutout:
        train.append(Cutout(args.cutout_length))
    return transforms.Compose(train), transforms.Compose(last)


def _data_transforms_cifar10(args: Any) -> tuple[Any, Any]:
    """Transforms for training and validation; reads ``args.cutout`` and ``args.cutout_length``."""
    return _transforms(args, (0.4914, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159))


def _data_transforms_cifar100(args: Any) -> tuple[Any, Any]:
    """As for CIFAR-10, with the mean and deviation of CIFAR-100."""
    return _transforms(args, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def count_parameters_in_MB(model: nn.Module) -> float:
    """Millions of parameters, without those of auxiliary heads."""
    counts = (p.numel() for name, p in model.named_parameters() if "auxiliary" not in name)
    return sum(counts) / 1e6


def save(model: nn.Module, model_path: str) -> None:
    """Writes the model's ``state_dict``."""
    torch.save(model.state_dict(), model_path)


def load(model: nn.Module, model_path: str) -> None:
    """Loads what ``save`` wrote."""
    model.load_state_dict(torch.load(model_path, map_location="cpu", weights_only=True))


def save_checkpoint(state: Any, is_best: bool, save: str) -> None:
    """Writes ``state`` to ``checkpoint.pth.tar`` in the folder ``save``; the best one twice."""
    path = os.path.join(save, CHECKPOINT)
    torch.save(state, path)
    if is_best:
        shutil.copyfile(path, os.path.join(save, BEST))


def create_exp_dir(path: str, scripts_to_save: Iterable[str] | None = None) -> None:
    """Makes the folder of an experiment and copies scripts into its folder ``scripts``."""
    os.makedirs(path, exist_ok=True)
    print(f"Experiment dir : {path}")
    if scripts_to_save is None:
        return
    folder = os.path.join(path, "scripts")
    os.makedirs(folder, exist_ok=True)
    for script in scripts_to_save:
        shutil.copyfile(script, os.path.join(folder, os.path.basename(script)))


def drop_path(x: Tensor, drop_prob: float) -> Tensor:
    """Zeroes whole samples of ``[N, C, H, W]`` and scales the others; ``x`` itself for 0."""
    return network.drop_path(x, drop_prob) if drop_prob > 0 else x
