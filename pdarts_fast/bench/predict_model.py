"""Arithmetic of the predicted time: bytes, instructions and launches to seconds.

No kernel of this model ran on a GPU. A launch takes the larger of

    bytes / (bandwidth * MEMORY_SHARE)
    instruction slots / (multiprocessors in use * 4 schedulers * clock * ISSUE_SHARE)
    products / (tensor rate * TENSOR_SHARE)

plus the cost of a launch replayed from a graph and of filling and draining the machine. Shares are
what well-written kernels reach, not what these were seen to reach: totals are good to about 40 %,
rankings are better than that.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of an H100 SXM these give 2.4 of 3.35 TB/s and 65 % of the instruction bound.
MEMORY_SHARE, ISSUE_SHARE, TENSOR_SHARE = 0.72, 0.65, 0.5
REPLAY_SECONDS, RAMP_SECONDS = 1.3e-6, 1.5e-6
# An operator of eager torch with autograd: what the processor needs to issue it.
EAGER_SECONDS = 6e-6
ERROR_BAND = 0.4
SCHEDULERS, LANES = 4, 32


@dataclass(frozen=True)
class Gpu:
    """A card by its datasheet.

    Attributes:
        title: Full name.
        multiprocessors: How many.
        clock: Boost clock, Hz.
        bandwidth: Of memory, bytes/s.
        tensor: Dense bfloat16 rate with float32 sums, FLOP/s.
    """

    title: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor: float


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 312e12),
    "h100": Gpu("H100 SXM", 132, 1.755e9, 3.35e12, 989e12),
    "b200": Gpu("B200", 148, 1.85e9, 8.0e12, 2250e12),
    "rtx4090": Gpu("GeForce RTX 4090", 128, 2.52e9, 1.008e12, 165e12),
}


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        name: Of the kernel.
        bytes: That must move.
        slots: Warp instructions issued, all warps together.
        product_flops: In tensor cores.
        programs: Of the grid.
    """

    name: str
    bytes: int
    slots: float
    product_flops: float
    programs: int


def memory_seconds(work: Work, gpu: Gpu) -> float:
    """Roofline of the bytes."""
    return work.bytes / (gpu.bandwidth * MEMORY_SHARE)


def issue_seconds(work: Work, gpu: Gpu) -> float:
    """Roofline of the instructions, on as many multiprocessors as there are programs."""
    used = min(gpu.multiprocessors, work.programs)
    return work.slots / (used * SCHEDULERS * gpu.clock * ISSUE_SHARE)


def tensor_seconds(work: Work, gpu: Gpu) -> float:
    """Roofline of the products."""
    return work.product_flops / (gpu.tensor * TENSOR_SHARE)


def body_seconds(work: Work, gpu: Gpu) -> float:
    """A launch without its overhead."""
    return max(memory_seconds(work, gpu), issue_seconds(work, gpu), tensor_seconds(work, gpu))


def launch_seconds(work: Work, gpu: Gpu) -> float:
    """A launch replayed from a graph."""
    return body_seconds(work, gpu) + REPLAY_SECONDS + RAMP_SECONDS


def roofline_ratio(work: Work, gpu: Gpu) -> float:
    """Body over what bytes and products alone would take: 1 if bound by either."""
    floor = max(memory_seconds(work, gpu), tensor_seconds(work, gpu))
    return body_seconds(work, gpu) / floor if floor else 1.0


def eager_seconds(moved: int, gpu: Gpu) -> float:
    """An operator of eager torch: bound by its launch or by its bytes."""
    return max(EAGER_SECONDS, moved / (gpu.bandwidth * MEMORY_SHARE) + RAMP_SECONDS)


def search_seconds(
    passes: dict[int, tuple[float, float]], steps: int, weight_epochs: int, both_epochs: int
) -> float:
    """A whole search.

    Args:
        passes: By stage: seconds of a weight step's pass and of an alpha step's.
        steps: An epoch.
        weight_epochs: Epochs of a stage that train weights only.
        both_epochs: Epochs of a stage with an alpha step before every weight step.
    """
    total = 0.0
    for weight, alpha in passes.values():
        total += steps * ((weight_epochs + both_epochs) * weight + both_epochs * alpha)
    return total
