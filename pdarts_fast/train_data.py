"""The loaders of a training run, of images in memory or of files, behind one door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdarts_fast.data import Augmentation, Loader, load_dataset
from pdarts_fast.data.choose import array_loader, choose_loader, file_loader
from pdarts_fast.data.files import MEAN, STD, find_images
from pdarts_fast.data.plan import Shard
from pdarts_fast.data.views import StreamAugmentation
from pdarts_fast.train_config import TrainConfig


@dataclass(frozen=True)
class TrainData:
    """What a training run reads.

    Attributes:
        train: Training images, shuffled and augmented.
        test: Test images, in their order and as they are.
        facts: What config.json says of them: name, num_classes, classes, train_images,
            test_images, image_size, mean, std.
    """

    train: Loader
    test: Loader
    facts: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.facts["num_classes"]


Normalisation = tuple[Sequence[float], Sequence[float]]


def open_data(
    config: TrainConfig,
    device: torch.device,
    normalisation: Normalisation | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainData:
    """Opens the data set of a configuration.

    Args:
        config: A validated configuration, or one whose data flags are checked.
        device: Where batches appear.
        normalisation: Mean and standard deviation of each channel in 0..1; None for those of the
            training images (of ImageNet for images read file by file).
        rank: This process among those that share each batch, see `Shard`.
        world_size: How many share it.

    Raises:
        UsageError: The folder is not there, a value is out of range, or the loader cannot run.
        RunError: Data that is missing, damaged or too large for the memory.
    """
    loader = choose_loader(config.loader, device, files=config.streams)
    open_it = _streaming if config.streams else _in_memory
    return open_it(config, loader, device, normalisation, Shard(rank, world_size))


def _in_memory(
    config: TrainConfig,
    loader: str,
    device: torch.device,
    normalisation: Normalisation | None,
    shard: Shard,
) -> TrainData:
    folder = config.dataset == "imagenet"
    dataset = load_dataset(
        "image-folder" if folder else config.dataset,
        config.data,
        image_size=config.image_size,
        download=config.download,
        checksum=config.checksum,
        workers=config.workers,
        skip_broken=config.skip_broken,
    )
    mean, std = normalisation or (dataset.mean, dataset.std)
    train, test = (
        array_loader(
            loader,
            images,
            batch_size=config.batch_size,
            augmentation=augmentation,
            mean=mean,
            std=std,
            seed=config.seed,
            stream=stream,
            shuffle=stream == "train",
            device=device,
            workers=config.workers,
            rank=shard.rank,
            world_size=shard.world_size,
        )
        for stream, images, augmentation in (
            ("train", dataset.train, Augmentation(config.crop_padding, config.flip, config.cutout)),
            ("test", dataset.test, None),
        )
    )
    facts = dataset.facts(config.dataset) | {"mean": list(mean), "std": list(std)}
    return TrainData(train, test, facts)


def _streaming(
    config: TrainConfig,
    loader: str,
    device: torch.device,
    normalisation: Normalisation | None,
    shard: Shard,
) -> TrainData:
    assert config.data is not None
    files = find_images(Path(config.data).expanduser())
    mean, std = normalisation or (MEAN, STD)
    train, test = (
        file_loader(
            loader,
            listing,
            batch_size=config.batch_size,
            image_size=config.image_size,
            augmentation=augmentation,
            mean=mean,
            std=std,
            seed=config.seed,
            stream=stream,
            shuffle=stream == "train",
            device=device,
            workers=config.workers,
            skip_broken=config.skip_broken,
            rank=shard.rank,
            world_size=shard.world_size,
        )
        for stream, listing, augmentation in (
            ("train", files.train, StreamAugmentation(config.flip, config.jitter)),
            ("test", files.test, None),
        )
    )
    facts = {
        "name": config.dataset,
        "num_classes": len(files.classes),
        "classes": list(files.classes),
        "train_images": train.num_images,
        "test_images": test.num_images,
        "image_size": config.image_size,
        "mean": list(mean),
        "std": list(std),
    }
    return TrainData(train, test, facts)
