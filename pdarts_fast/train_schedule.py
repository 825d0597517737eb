"""Learning rate and drop-path of a training run as functions of the epoch. Imports no torch."""

from __future__ import annotations

import math

from pdarts_fast.train_config import WARMUP_BATCH_SIZE, TrainConfig

SLOW_EPOCHS = 5
"""Last epochs of the linear schedule, in which it falls at `SLOW_SLOPE` of its slope."""
SLOW_SLOPE = 0.2


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch.

    Args:
        epoch: 0-based epoch.

    Returns:
        cosine: ``lr_min + (lr - lr_min) (1 + cos(pi e / E)) / 2``.
        linear: falls from lr at e = 0 to 0 at e = E without a jump, in the last 5 epochs at a
        fifth of the slope of the others.
        Either times ``(e + 1) / W`` in the first W = warmup_epochs if batch_size is above 256.

    Source:
        arXiv 1904.12760, sections 4.2.2 and 4.3.
    """
    if config.lr_schedule == "cosine":
        share = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        rate = config.lr_min + (config.lr - config.lr_min) * share
    else:
        slow = min(SLOW_EPOCHS, config.epochs)
        # What is left of the fall at an epoch, in epochs of full slope.
        left = max(config.epochs - slow - epoch, 0) + SLOW_SLOPE * min(config.epochs - epoch, slow)
        rate = config.lr * left / (config.epochs - slow + SLOW_SLOPE * slow)
    if config.batch_size > WARMUP_BATCH_SIZE and epoch < config.warmup_epochs:
        rate *= (epoch + 1) / config.warmup_epochs
    return rate


def drop_path(config: TrainConfig, epoch: int) -> float:
    """Drop-path probability of a 0-based epoch: ``drop_path e / E``.

    Source:
        arXiv 1904.12760, section 4.2.2.
    """
    return config.drop_path * epoch / config.epochs
