"""What two ranks check of `pdarts_fast.distributed`; torchrun starts this file.

Every check runs on both ranks. A rank writes what went wrong, by name of the check, as JSON to
``<first argument>/<rank>.json``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pdarts_fast.config import SearchConfig
from pdarts_fast.data import Augmentation, ImageData, ResidentLoader
from pdarts_fast.distributed import SINGLE, Ranks, digest_of, joined
from pdarts_fast.errors import RunError, UsageError
from pdarts_fast.launch import should_print
from pdarts_fast.skip_dropout import DropoutControl
from pdarts_fast.step import SearchStep
from pdarts_fast.strategies.base import Trials
from pdarts_fast.strategies.opp import trial_loss

CPU = torch.device("cpu")
CHECKS: dict[str, Callable[[Ranks], None]] = {}


def check(run: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
    """Adds a function to the checks."""
    CHECKS[run.__name__] = run
    return run


class Smooth(nn.Module):
    """A network with weights and alphas and without BatchNorm, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)
        self.alphas = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.ones(4))
        self.double().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)) * self.alphas.softmax(0))

    def weight_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name != "alphas"]

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alphas]

    def update_p(self) -> None:
        """There is no dropout."""


def loader(ranks: Ranks, count: int = 20, batch_size: int = 8) -> ResidentLoader:
    rng = np.random.default_rng(5)
    pixels = torch.from_numpy(rng.integers(0, 256, (count, 3, 9, 9), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 5, count))
    data = ImageData("random", pixels, labels, tuple("abcde"))
    return ResidentLoader(
        data, batch_size=batch_size, augmentation=Augmentation(2, True, 3), mean=(0.4,) * 3,
        std=(0.3,) * 3, seed=1, stream="s", shuffle=True, device=CPU, dtype=torch.float64,
        rank=ranks.rank, world_size=ranks.size,
    )  # fmt: skip


def trained(ranks: Ranks) -> SearchStep:
    """A step after three steps of both kinds on this rank's part of each batch."""
    step = SearchStep(Smooth(), SearchConfig(lr=0.5, grad_clip=0.05), CPU)  # type: ignore[arg-type]
    step.average_gradients = ranks.average_gradients
    for number, (images, labels) in enumerate(loader(ranks).epoch(0)):
        step.alpha_step(images, labels, number)
        step.weight_step(images, labels, number)
    return step


@check
def steps_of_two_ranks_are_those_of_one_process(ranks: Ranks) -> None:
    together, alone = trained(ranks), trained(SINGLE)
    fresh = Smooth()
    for (name, got), wanted, before in zip(
        together.network.named_parameters(), alone.network.parameters(), fresh.parameters(),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, msg=name)
        assert name == "unused" or (got - before).abs().max() > 1e-5, name
    ranks.require_equal("the weights", digest_of(together.network))
    ranks.collect(together.interval_meter.sums)
    if ranks.is_first:
        torch.testing.assert_close(together.interval_meter.sums, alone.interval_meter.sums)
    else:
        assert not together.interval_meter.sums.any()


@check
def without_the_average_the_ranks_drift_apart_and_it_is_noticed(ranks: Ranks) -> None:
    class Apart(Ranks):
        def average_gradients(self, parameters: object) -> None:
            """Forgotten."""

    step = trained(Apart(ranks.launch))
    with pytest.raises(RunError, match="the weights of rank 1 differ from those of rank 0") as said:
        ranks.require_equal("the weights", digest_of(step.network))
    assert should_print(said.value) == ranks.is_first


@check
def average_is_one_all_reduce_without_a_host_read(ranks: Ranks) -> None:
    values = [torch.full(shape, ranks.rank + 1.0) for shape in ((3,), (2, 5), (1, 2, 3, 3))]
    values[2] = values[2].contiguous(memory_format=torch.channels_last)

    def average(*tensors: Tensor) -> list[Tensor]:
        ranks.average(tensors)
        return list(tensors)

    average(*values)
    for value in values:
        torch.testing.assert_close(value, torch.full_like(value, 1.5))
    graph = make_fx(average)(*values).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("allreduce" in name for name in called) == 1, called
    for forbidden in ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten._to_copy"):
        assert not any(name.startswith(forbidden) for name in called), called


@check
def average_uses_the_same_buffer_every_time(ranks: Ranks) -> None:
    seen = []
    for number in range(3):
        value = torch.full((7,), float(ranks.rank * number), dtype=torch.float64)
        ranks.average([value])
        torch.testing.assert_close(value, torch.full_like(value, number / 2))
        buffers = ranks._buffers  # type: ignore[attr-defined]
        seen.append(buffers[(7, torch.float64, CPU)].data_ptr())
    assert len(set(seen)) == 1


@check
def running_statistics_are_averaged_and_nothing_else(ranks: Ranks) -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(2, 2))
    for value in network.parameters():
        value.data.fill_(ranks.rank)
    network[0].running_mean.fill_(ranks.rank * 4.0)
    ranks.average_statistics(network)
    assert network[0].running_mean.tolist() == [2.0, 2.0]
    assert network[0].num_batches_tracked == 0
    assert all((value == ranks.rank).all() for value in network.parameters())


@check
def a_failure_of_rank_1_is_one_of_all_and_rank_0_tells_it(ranks: Ranks) -> None:
    for kind in (UsageError, RunError):

        def fail(kind: type[Exception] = kind) -> int:
            if ranks.rank == 1:
                raise kind("--data /x: no such folder")
            return 4

        with pytest.raises(kind, match="--data /x: no such folder") as said:
            ranks.together(fail)
        assert should_print(said.value) == ranks.is_first
    assert ranks.together(lambda: 4 + ranks.rank) == 4 + ranks.rank


@check
def rank_0_works_for_all(ranks: Ranks) -> None:
    done = []

    def work() -> Path:
        done.append(1)
        return Path("runs") / str(ranks.rank)

    assert ranks.first(work) == Path("runs/0")
    assert len(done) == (ranks.rank == 0)
    with pytest.raises(OSError, match="disk") if ranks.is_first else pytest.raises(RunError):
        ranks.first(lambda: (_ for _ in ()).throw(OSError("disk")))


@check
def values_are_agreed_on(ranks: Ranks) -> None:
    assert ranks.agree(2 if ranks.rank else -1) == 2
    assert ranks.gather(ranks.rank * 10) == [0, 10]
    total = ranks.total(torch.tensor([[1, 2 + ranks.rank]]))
    assert total.tolist() == [[2, 5]]
    state = {"a": torch.arange(3), "b": [1.5, "x"]} if ranks.is_first else None
    got = ranks.broadcast_state(state)
    assert got is not None
    assert (got["a"].tolist(), got["b"]) == ([0, 1, 2], [1.5, "x"])
    assert ranks.broadcast_state(None) is None


@check
def masks_of_the_ranks_differ_and_those_of_rank_0_stay(ranks: Ranks) -> None:
    control = DropoutControl(0.5, seed=2**63 + 11)
    before = control.state.clone()
    ranks.shift_seed(control.state)
    assert (control.state == before).all() == ranks.is_first
    seeds = ranks.gather(control.state.tolist())
    assert (seeds[1][0] - seeds[0][0]) % 2**64 == 0x9E3779B97F4A7C15
    assert seeds[0][1] == seeds[1][1]


@check
def devices_of_different_types_are_refused(ranks: Ranks) -> None:
    ranks.use(CPU)
    with pytest.raises(RunError, match="--device is cpu, cuda on ranks"):
        ranks.use(SimpleNamespace(type="cuda" if ranks.rank else "cpu"))  # type: ignore[arg-type]


@check
def an_evaluation_shows_each_image_once(ranks: Ranks) -> None:
    for count in (1, 2, 3, 9, 16):
        part = loader(ranks, count, 6)
        shown = [labels for _, labels in ranks.without_repeats(part, 6).epoch(2)]
        mine = torch.cat(shown)
        assert len(shown) == len(part)
        wanted = torch.cat([labels for _, labels in loader(SINGLE, count, 6).epoch(2)])
        got = sorted(x for labels in ranks.gather(mine.tolist()) for x in labels)
        assert got == sorted(wanted.tolist()), count


@check
def a_trial_counts_each_image_once_and_all_ranks_get_its_loss(ranks: Ranks) -> None:
    step = SearchStep(Smooth(), SearchConfig(), CPU)  # type: ignore[arg-type]

    def loss(those: Ranks, count: int) -> float:
        def batches(number: int) -> Iterator[tuple[Tensor, Tensor, int]]:
            part = loader(those, count, 6)
            own = those.shard.own_of_batches(count, 6)
            for images, (pixels, labels) in zip(own, part.epoch(number), strict=True):
                yield pixels, labels, images

        return trial_loss(step, Trials(batches, those, lambda: None), 2)

    for count in (1, 2, 3, 9, 16):
        found = loss(ranks, count)
        assert found == pytest.approx(loss(SINGLE, count), rel=1e-14), count
        assert ranks.gather(found) == [found, found]


def main(folder: Path) -> None:
    """Runs all checks on this rank."""
    torch.set_num_threads(1)
    done: dict[str, str] = {}
    with joined() as ranks:
        file = folder / f"{ranks.rank}.json"
        assert ranks.size == 2
        with joined() as again:
            assert again is ranks
        for name, run in CHECKS.items():
            try:
                run(ranks)
                done[name] = ""
            except BaseException:
                # Ends the other rank too, which may wait for this one in a collective.
                done[name] = traceback.format_exc()
                raise
            finally:
                file.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
