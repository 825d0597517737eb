"""Which images of a batch each of several ranks shows."""

from __future__ import annotations

import numpy as np
import pytest

from pdarts_fast.data.shard import Shard


@pytest.mark.parametrize("images", range(1, 14))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_parts_are_equal_and_hold_every_image(images: int, world_size: int) -> None:
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    parts = [shard.places(7, 7 + images) for shard in shards]
    assert {len(part) for part in parts} == {shards[0].size(images)}
    assert set(np.concatenate(parts)) == set(range(7, 7 + images))
    # BatchNorm needs two values a channel wherever the batch has them.
    assert len(parts[0]) >= min(2, images)
    own = [part[: shard.own(images)] for part, shard in zip(parts, shards, strict=True)]
    assert np.concatenate(own).tolist() == list(range(7, 7 + images))


def test_a_batch_that_divides_is_cut_into_contiguous_parts_without_repeats() -> None:
    parts = [Shard(rank, 3).places(10, 22).tolist() for rank in range(3)]
    assert parts == [list(range(10, 14)), list(range(14, 18)), list(range(18, 22))]


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_numbers_out_of_range_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Shard(rank, size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("images", [0, 1, 5, 12, 13])
def test_own_images_of_all_batches_are_all_images(images: int, world_size: int) -> None:
    parts = [Shard(rank, world_size).own_of_batches(images, 6) for rank in range(world_size)]
    assert {len(part) for part in parts} == {-(-images // 6)}
    assert [sum(batch) for batch in zip(*parts, strict=True)] == [
        min(6, images - start) for start in range(0, images, 6)
    ]
