"""Masks drawn by the compiled library are those that torch draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdarts_fast.kernels.cpu import draw, load
from pdarts_fast.kernels.cpu.library import Library

pytestmark = pytest.mark.skipif(not load.availability().usable, reason=load.availability().reason)


def library() -> Library:
    found = load._load()
    assert isinstance(found, Library)
    return found


def generators(seed: int, words: int) -> tuple[torch.Generator, torch.Generator]:
    """Two generators in the same state, from which an odd number of words may have been drawn."""
    first, second = torch.Generator(), torch.Generator()
    first.manual_seed(seed)
    if words:
        torch.randint(7, (words,), dtype=torch.int32, generator=first)
    second.set_state(first.get_state())
    return first, second


def by_torch(
    kept: Tensor, channels: int, probabilities: list[float], generator: torch.Generator
) -> list[Tensor]:
    images, height, width = kept.shape[1:4]
    shape = (images, channels, height, width)
    return [torch.empty(shape).bernoulli_(p, generator=generator) for p in probabilities]


def check(kept: Tensor, channels: int, masks: list[Tensor]) -> None:
    for found, wanted in zip(kept, masks, strict=True):
        assert torch.equal(found[..., :channels].permute(0, 3, 1, 2).float(), wanted)
    assert not kept[..., channels:].any()


def test_this_torch_draws_as_the_library_does() -> None:
    before = torch.get_rng_state()
    assert draw.agrees(library()), "torch draws in another way: masks are drawn by torch itself"
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (5, 20, 9, 9))),
    padding=st.integers(0, 9),
    probabilities=st.lists(
        st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**63 - 1),
    words=st.sampled_from([0, 1, 2, 311, 623, 624, 625, 1000]),
    threads=st.integers(1, 4),
)
def test_masks_and_generator_are_those_of_torch(
    shape: tuple[int, int, int, int],
    padding: int,
    probabilities: list[float],
    seed: int,
    words: int,
    threads: int,
) -> None:
    images, channels, height, width = shape
    theirs, ours = generators(seed, words)
    kept = torch.full(
        (len(probabilities), images, height, width, channels + padding), 7, dtype=torch.uint8
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    draw.draw(library(), kept, channels, probabilities, ours)
    torch.set_num_threads(before)
    check(kept, channels, by_torch(kept, channels, probabilities, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())
    following = [torch.rand(3, generator=generator) for generator in (ours, theirs)]
    assert torch.equal(*following)


@pytest.mark.parametrize("threads", [1, 2, 3], ids="{}-threads".format)
@pytest.mark.usefixtures("one_thread")
def test_many_images_go_through_the_same_room(threads: int) -> None:
    probabilities = [0.6, 0.3]
    theirs, ours = generators(3, 1)
    kept = torch.empty((2, 33, 8, 8, 16), dtype=torch.uint8)
    torch.set_num_threads(threads)
    draw.draw(library(), kept, 16, probabilities, ours)
    check(kept, 16, by_torch(kept, 16, probabilities, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_nothing_drawn_leaves_the_generator() -> None:
    theirs, ours = generators(1, 5)
    draw.draw(library(), torch.empty((1, 0, 4, 4, 8), dtype=torch.uint8), 8, [0.5], ours)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_another_way_of_drawing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw.agrees.cache_clear()
    real = torch.Tensor.bernoulli_

    def backwards(self: Tensor, p: float, generator: torch.Generator) -> Tensor:
        return 1 - real(self, p, generator=generator)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", backwards)
    try:
        assert not draw.agrees(library())
    finally:
        draw.agrees.cache_clear()
