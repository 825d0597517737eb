"""Sharing batches between ranks, and the choices that all loaders carry out."""

from __future__ import annotations

import numpy as np
import pytest

from pdarts_fast.data.plan import Augmentation, BatchedLoader, Plan, draw_plan
from pdarts_fast.data.shard import Shard


def ranks(world_size: int) -> list[Shard]:
    return [Shard(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_and_their_number_do_not_depend_on_the_ranks(world_size: int) -> None:
    whole = BatchedLoader[int](23, 5, None)
    for shard in ranks(world_size):
        loader = BatchedLoader[int](23, 5, shard)
        assert (len(loader), loader.num_images) == (len(whole), 23) == (5, 23)
        for start in range(6):
            assert len(loader._places(start)) == 5 - start
    shares = [BatchedLoader[int](23, 5, shard)._places(0) for shard in ranks(world_size)]
    for parts, batch in zip(zip(*shares, strict=True), whole._places(0), strict=True):
        assert set(np.concatenate(parts)) == set(batch)


def test_a_kind_of_choice_does_not_move_another() -> None:
    rows = np.arange(40)
    all_on = draw_plan((0, "s"), 2, rows, (8, 8), Augmentation(4, True, 3), True)
    for augmentation, same in (
        (Augmentation(4, False, 0), ("rows", "crop_y", "crop_x")),
        (Augmentation(0, True, 0), ("rows", "flip")),
        (Augmentation(0, False, 3), ("rows", "hole_y", "hole_x")),
        (None, ("rows",)),
    ):
        plan = draw_plan((0, "s"), 2, rows, (8, 8), augmentation, True)
        for name in Plan._fields:
            equal = np.array_equal(getattr(plan, name), getattr(all_on, name))
            assert equal == (name in same), name


def test_take_selects_every_choice() -> None:
    plan = Plan(*(np.arange(6) + 10 * column for column in range(6)))
    taken = plan.take(np.array([4, 0, 4]))
    assert [choices.tolist() for choices in taken] == [
        [10 * c + i for i in (4, 0, 4)] for c in range(6)
    ]
