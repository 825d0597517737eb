"""Learning rate and skip dropout as functions of the epoch. Imports no torch."""

from __future__ import annotations

import math

from pdarts_fast.config import SearchConfig


def learning_rate(config: SearchConfig, epoch: int) -> float:
    """Cosine from ``lr`` to ``lr_min`` over the epochs of a stage.

    Args:
        epoch: 0-based epoch within the stage.

    Returns:
        ``lr_min + (lr - lr_min) (1 + cos(pi e / E)) / 2`` with e = epoch for the schedule of the
        paper, and e = epoch + 1 for ``lr_schedule="reference"``.

    Source:
        arXiv 1904.12760, section 4.2.2.
    """
    e = epoch + (config.lr_schedule == "reference")
    return (
        config.lr_min
        + (config.lr - config.lr_min) * (1 + math.cos(math.pi * e / config.epochs)) / 2
    )


def skip_dropout(config: SearchConfig, stage: int, epoch: int) -> float:
    """Dropout probability after identity skips.

    Args:
        stage: 0-based stage.
        epoch: 0-based epoch within the stage.

    Returns:
        ``p (E - e - 1) / E`` while alphas are frozen, then ``p exp(-decay (e - warmup))``.

    Source:
        arXiv 1904.12760, section 3.3.1.
    """
    p = config.skip_dropout[stage]
    if epoch < config.warmup_epochs:
        return p * (config.epochs - epoch - 1) / config.epochs
    return p * math.exp(-config.skip_dropout_decay * (epoch - config.warmup_epochs))
