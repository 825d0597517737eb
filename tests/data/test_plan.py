"""Sharing batches between ranks, and the choices that all loaders carry out."""

from __future__ import annotations

import numpy as np
import pytest

from pdarts_fast.data.plan import Augmentation, BatchedLoader, Plan, Shard, draw_plan


def ranks(world_size: int) -> list[Shard]:
    return [Shard(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("images", [1, 2, 5, 12, 96])
def test_ranks_show_the_batch_in_equal_parts(images: int, world_size: int) -> None:
    parts = [shard.places(100, 100 + images) for shard in ranks(world_size)]
    size = -(-images // world_size)
    assert {len(part) for part in parts} == {size} == {Shard(0, world_size).size(images)}
    shown = np.concatenate(parts)
    # In order, then again from the first: no image is missing, few are shown twice.
    expected = 100 + np.arange(size * world_size) % images
    assert shown.tolist() == expected.tolist()
    assert len(shown) - images < world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [1, 7, 40])
def test_own_counts_what_is_not_repeated(images: int, world_size: int) -> None:
    kept = [shard.places(0, images)[: shard.own(images)] for shard in ranks(world_size)]
    assert np.concatenate(kept).tolist() == list(range(images))


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (0, 0, "world_size must be at least 1, got 0"),
        (2, 2, r"rank must be in 0\.\.1, got 2"),
        (-1, 2, r"rank must be in 0\.\.1, got -1"),
    ],
)
def test_bad_shards_are_refused(rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shard(rank, world_size)


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
