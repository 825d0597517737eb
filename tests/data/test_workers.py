"""Worker processes: their failures in one line, and DALI's pipelines beside them."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from pdarts_fast.data.workers import worker_batches
from pdarts_fast.errors import RunError

CPU = torch.device("cpu")


class Failing(torch.utils.data.Dataset):
    """Squares; place 5 fails in its own way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, place: int) -> torch.Tensor:
        if place == 5 and self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if place == 5 and self.kind == "error":
            raise OSError("the disk is gone")
        return torch.tensor(place**2)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_order(workers: int) -> None:
    made = worker_batches(Failing("never"), [[0, 1], [2, 5], [4]], workers=workers, device=CPU)
    assert [batch.tolist() for batch in made] == [[0, 1], [4, 25], [16]]


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        ("killed", 1, r"(killed by signal|exited unexpectedly)"),
        ("error", 1, "the disk is gone"),
        ("error", 0, "the disk is gone"),
    ],
    ids=["killed", "error", "error-in-this-process"],
)
def test_a_failure_is_one_line(kind: str, workers: int, message: str) -> None:
    made = worker_batches(Failing(kind), [[0, 1], [4, 5], [6]], workers=workers, device=CPU)
    with pytest.raises(RunError, match=f"--loader torchvision.*{message}") as error:
        list(made)
    assert "\n" not in str(error.value)


def test_a_worker_process_runs_beside_a_live_pipeline() -> None:
    """A fork inherits DALI's objects without their threads: it must not end them."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from pdarts_fast.data import Augmentation, ImageData
    from pdarts_fast.data.choose import array_loader

    data = ImageData("zeros", torch.zeros((64, 3, 8, 8), dtype=torch.uint8),
                     torch.zeros(64, dtype=torch.int64), ("a",))  # fmt: skip
    loader = array_loader(
        "dali", data, device=CPU, batch_size=4, augmentation=Augmentation(), mean=(0, 0, 0),
        std=(1, 1, 1), seed=0, stream="s", shuffle=True,
    )  # fmt: skip
    running = loader.epoch(0)
    next(running)
    made = worker_batches(Failing("never"), [[1]] * 20, workers=1, device=CPU)
    assert len(list(made)) == 20
    assert len(list(running)) == 15


def test_a_loader_that_is_dropped_ends_its_threads_at_once() -> None:
    """Not when the garbage collector gets to it: that might be in a forked process."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from pdarts_fast.data import ImageData
    from pdarts_fast.data.choose import array_loader

    data = ImageData("zeros", torch.zeros((8, 3, 8, 8), dtype=torch.uint8),
                     torch.zeros(8, dtype=torch.int64), ("a",))  # fmt: skip

    def threads() -> int:
        return sum(
            "DALI" in open(f"/proc/self/task/{task}/comm").read()
            for task in os.listdir("/proc/self/task")
        )

    before = threads()
    loader = array_loader(
        "dali", data, device=CPU, batch_size=4, augmentation=None, mean=(0, 0, 0), std=(1, 1, 1),
        seed=0, stream="s", shuffle=False,
    )  # fmt: skip
    kept = [images for images, _ in loader.epoch(0)]
    assert threads() > before
    del loader
    assert threads() == before
    assert all(bool((images == 0).all()) for images in kept)
