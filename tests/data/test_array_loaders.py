"""DALI's and torchvision's loaders of arrays: the resident loader's batches, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pdarts_fast.data import Augmentation, ImageData, Loader
from pdarts_fast.data.choose import array_loader
from pdarts_fast.data.dali_pipeline import missing

MEAN, STD = (0.501, 0.402, 0.303), (0.25, 0.2, 0.3)
needs_dali = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"
)
# Name and workers.
RIVALS = [
    pytest.param(("dali", 1), id="dali", marks=needs_dali),
    pytest.param(("torchvision", 0), id="torchvision"),
    pytest.param(("torchvision", 1), id="torchvision-worker"),
]
QUICK = RIVALS[:2]


def make_data(count: int, height: int = 8, width: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator
    )
    return ImageData("random", images, torch.arange(count) % 10, tuple("abcdefghij"))


def make(rival: tuple[str, int], data: ImageData, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "batch_size": 16,
        "augmentation": Augmentation(4, True, 5),
        "mean": MEAN,
        "std": STD,
        "seed": 3,
        "stream": "weights",
        "shuffle": True,
        "device": torch.device("cpu"),
    }
    return array_loader(rival[0], data, workers=rival[1], **options | changes)


def reference(data: ImageData, **changes: Any) -> Loader:
    return make(("resident", 0), data, **changes)


def assert_same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(want)
    for (images, labels), (images_wanted, labels_wanted) in zip(got, want, strict=True):
        assert images.dtype == torch.float32
        assert torch.equal(images.cpu(), images_wanted)
        assert labels.dtype == torch.int64
        assert torch.equal(labels.cpu(), labels_wanted)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(8, 8, id="square"),
        pytest.param(6, 9, id="wide"),
        pytest.param(32, 32, id="cifar"),
    ],
)
def test_batches_are_the_resident_loaders(rival: Any, height: int, width: int) -> None:
    data = make_data(90, height, width)
    loader, wanted = make(rival, data), reference(data)
    assert isinstance(loader, Loader)
    assert (len(loader), loader.num_images) == (6, 90)
    for epoch in range(2):
        assert_same(list(loader.epoch(epoch)), list(wanted.epoch(epoch)))


@pytest.mark.parametrize("rival", QUICK)
@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param(None, id="none"),
        pytest.param(Augmentation(0, False, 0), id="all-off"),
        pytest.param(Augmentation(4, False, 0), id="crop"),
        pytest.param(Augmentation(0, True, 0), id="flip"),
        pytest.param(Augmentation(0, False, 1), id="one-pixel-hole"),
        pytest.param(Augmentation(0, False, 40), id="hole-beyond-the-image"),
        pytest.param(Augmentation(11, True, 3), id="padding-beyond-the-image"),
    ],
)
def test_every_augmentation_alone(rival: Any, augmentation: Augmentation | None) -> None:
    data = make_data(40)
    options = {"augmentation": augmentation, "shuffle": augmentation is not None}
    assert_same(
        list(make(rival, data, **options).epoch(1)), list(reference(data, **options).epoch(1))
    )


@pytest.mark.parametrize("rival", QUICK)
def test_every_value_of_a_pixel_is_normalised_alike(rival: Any) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    data = ImageData("ramp", images, torch.zeros(1, dtype=torch.int64), ("only",))
    for mean, std in ((MEAN, STD), ((0.1307, 0.48215827, 1 / 3), (0.3081, 1 / 7, 1.0))):
        options = {"augmentation": None, "mean": mean, "std": std}
        assert_same(
            list(make(rival, data, **options).epoch(0)), list(reference(data, **options).epoch(0))
        )


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_start_skips_batches_without_changing_the_others(rival: Any, start: int) -> None:
    data = make_data(70)
    assert_same(list(make(rival, data).epoch(2, start)), list(reference(data).epoch(2))[start:])


@pytest.mark.parametrize("rival", RIVALS)
def test_iterations_may_be_interleaved_and_given_up(rival: Any) -> None:
    data = make_data(64)
    wanted = list(reference(data).epoch(1))
    loader = make(rival, data)
    first, second = loader.epoch(1), loader.epoch(0)
    next(second)
    got = [next(first)]
    next(second)
    del second
    got += list(first)
    assert_same(got, wanted)
    for _ in range(3):
        next(iter(loader.epoch(0)))
    assert_same(list(loader.epoch(1)), wanted)


@pytest.mark.parametrize("rival", RIVALS)
def test_batches_that_are_kept_stay_as_they_were(rival: Any) -> None:
    data = make_data(300)
    batches = list(make(rival, data).epoch(0))
    copies = [(images.clone(), labels.clone()) for images, labels in batches]
    list(make(rival, data).epoch(1))
    assert_same(batches, copies)
    assert_same(batches, list(reference(data).epoch(0)))


@pytest.mark.parametrize("rival", [pytest.param(("resident", 0), id="resident"), *QUICK])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_show_what_one_process_shows(rival: Any, world_size: int) -> None:
    data = make_data(50)  # Batches of 16, 16, 16 and 2.
    wanted = list(reference(data).epoch(1, 1))
    parts = [
        list(make(rival, data, rank=rank, world_size=world_size).epoch(1, 1))
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {3}
    for number, (images, labels) in enumerate(wanted):
        shown = [part[number] for part in parts]
        assert len({len(part[1]) for part in shown}) == 1
        assert torch.equal(torch.cat([part[0] for part in shown])[: len(labels)], images)
        assert torch.equal(torch.cat([part[1] for part in shown])[: len(labels)], labels)
    last = torch.cat([part[-1][0] for part in parts])
    assert torch.equal(last, torch.cat([wanted[-1][0]] * 2)[: len(last)])


@pytest.mark.parametrize("rival", QUICK)
def test_chosen_images_only(rival: Any) -> None:
    data = make_data(50)
    indices = np.array([40, 3, 17, 8, 49, 0, 21])
    options = {"indices": indices, "batch_size": 3}
    assert_same(
        list(make(rival, data, **options).epoch(0)), list(reference(data, **options).epoch(0))
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_the_global_generators_are_left_alone(rival: Any) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    list(make(rival, make_data(20)).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)


@pytest.mark.parametrize("rival", QUICK)
def test_bad_positions_are_refused_at_the_call(rival: Any) -> None:
    loader = make(rival, make_data(9))
    for arguments, message in (((-1,), "epoch must be 0"), ((0, 2), "between 0 and 1 batches")):
        with pytest.raises(ValueError, match=message):
            loader.epoch(*arguments)


@pytest.mark.parametrize("rival", QUICK)
def test_images_on_another_device_are_refused(rival: Any) -> None:
    data = make_data(4)
    # Past the checks of ImageData, which reads the labels.
    object.__setattr__(data, "images", data.images.to("meta"))
    with pytest.raises(ValueError, match="random: images are on meta, wanted the CPU"):
        make(rival, data)


@needs_cuda
@pytest.mark.parametrize("rival", [pytest.param(("resident", 0), id="resident"), *RIVALS])
def test_cuda_shows_what_the_cpu_shows(rival: Any) -> None:
    data = make_data(90, 32, 32)
    device = torch.device("cuda")
    batches = list(make(rival, data, device=device).epoch(1, 1))
    assert all(images.is_cuda and labels.is_cuda for images, labels in batches)
    assert_same(batches, list(reference(data).epoch(1, 1)))
