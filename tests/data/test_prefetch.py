"""Running ahead of the step: order, errors, and what happens when nobody listens any more."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pdarts_fast.data import Loader
from pdarts_fast.data.prefetch import Prefetcher

CPU = torch.device("cpu")


class Counting:
    """Six batches that hold their number; tells how many were made."""

    num_images = 6

    def __init__(self, fails_at: int | None = None) -> None:
        self.made = threading.Semaphore(0)
        self.count = 0
        self.fails_at = fails_at
        self.closed = threading.Event()

    def __len__(self) -> int:
        return 6

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if epoch < 0:
            raise ValueError("epoch must be 0 or more")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for number in range(start, 6):
                if number == self.fails_at:
                    raise OSError("the disk is gone")
                self.count += 1
                self.made.release()
                yield torch.full((1, 3, 2, 2), 10.0 * epoch + number), torch.tensor([number])
        finally:
            self.closed.set()


def numbers(batches: Iterator[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(labels) for _, labels in batches]


def test_it_is_a_loader_with_the_same_batches_in_order() -> None:
    ahead = Prefetcher(Counting(), CPU)
    assert isinstance(ahead, Loader)
    assert (len(ahead), ahead.num_images) == (6, 6)
    assert numbers(ahead.epoch(0)) == [0, 1, 2, 3, 4, 5]
    assert numbers(ahead.epoch(3, 4)) == [4, 5]
    assert numbers(ahead.epoch(3, 6)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_the_next_batch_is_made_while_the_step_runs(depth: int) -> None:
    source = Counting()
    batches = Prefetcher(source, CPU, depth).epoch(0)
    next(batches)
    # The one that was taken, those that are ready, and one in the thread's hands.
    for _ in range(1 + depth):
        assert source.made.acquire(timeout=20)
    assert source.count <= 2 + depth
    assert numbers(batches) == [1, 2, 3, 4, 5]


def test_an_error_comes_after_the_batches_before_it() -> None:
    batches = Prefetcher(Counting(fails_at=2), CPU).epoch(0)
    assert [int(next(batches)[1]), int(next(batches)[1])] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_wrong_epoch_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="epoch must be 0"):
        Prefetcher(Counting(), CPU).epoch(-1)


def test_the_thread_ends_when_the_iteration_is_given_up() -> None:
    before = threading.active_count()
    source = Counting()
    batches = Prefetcher(source, CPU).epoch(0)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert source.count < 6


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Prefetcher(Counting(), CPU, 0)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"
)
def test_cuda_batches_are_complete_when_they_are_used() -> None:
    class Slow(Counting):
        def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(start, 6):
                large = torch.full((4096, 4096), float(number), device="cuda")
                for _ in range(20):
                    large = large @ torch.eye(4096, device="cuda")
                yield large, torch.tensor([number], device="cuda")

    for number, (images, labels) in enumerate(Prefetcher(Slow(), torch.device("cuda")).epoch(0)):
        assert bool((images == number).all())
        assert int(labels) == number
