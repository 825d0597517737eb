"""ResidentLoader against torchvision's transforms, and what makes it exactly repeatable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional as tv

from pdarts_fast.data import Augmentation, ImageData, Loader, ResidentLoader
from pdarts_fast.data.plan import keyed_generator

# No pixel value is exactly a mean: zeros after normalisation come from cutout alone.
MEAN, STD = (0.501, 0.402, 0.303), (0.25, 0.2, 0.3)
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"
        ),
    ),
]


def make_data(count: int, height: int = 8, width: int = 8, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator
    )
    return ImageData("random", images, torch.arange(count) % 10, tuple("abcdefghij"))


def make_copies(count: int, height: int = 8, width: int = 8) -> ImageData:
    """One random image ``count`` times: batches then show the distribution of augmentations."""
    images = make_data(1, height, width).images.expand(count, -1, -1, -1).contiguous()
    return ImageData("copies", images, torch.zeros(count, dtype=torch.int64), ("only",))


def make_loader(data: ImageData, **changes) -> ResidentLoader:
    options = {
        "batch_size": 16,
        "augmentation": Augmentation(),
        "mean": MEAN,
        "std": STD,
        "seed": 3,
        "stream": "weights",
        "shuffle": True,
        "device": "cpu",
    }
    return ResidentLoader(data, **{**options, **changes})


def chi_square(counts: np.ndarray) -> float:
    """The probability of counts at least this uneven.

    One-dimensional counts should be equal, the rows and columns of a table independent.
    """
    counts = np.asarray(counts, dtype=np.float64)
    freedom = np.prod([size - 1 for size in counts.shape])
    if counts.ndim == 1:
        expected = np.full(counts.shape, counts.mean())
    else:
        expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))


def show(loader: ResidentLoader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def torchvision_variants(image: torch.Tensor, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every output RandomCrop(padding) + RandomHorizontalFlip can give, normalised."""
    height, width = image.shape[1:]
    padded = tv.pad(image, [padding] * 4)
    variants = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = tv.crop(padded, top, left, height, width)
            for flip in (False, True):
                pixels = tv.hflip(crop) if flip else crop
                output = tv.normalize(pixels.float().div(255), MEAN, STD)
                variants[output.numpy().tobytes()] = (top, left, flip)
    return variants


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("height", "width"),
    [pytest.param(8, 8, id="square"), pytest.param(6, 9, id="wide"), pytest.param(9, 5, id="tall")],
)
def test_crops_and_flips_are_torchvisions_and_uniform(height, width, device):
    data = make_copies(4860, height, width)
    variants = torchvision_variants(data.images[0], padding=4)
    assert len(variants) == 162
    images, _ = show(make_loader(data, batch_size=1000, device=device))
    # An output that is no torchvision crop, bit for bit, raises KeyError here.
    seen = [variants[image.tobytes()] for image in images.cpu().numpy()]
    counts = np.zeros((9, 9, 2), dtype=int)
    for top, left, flip in seen:
        counts[top, left, int(flip)] += 1
    assert counts.min() > 0
    assert chi_square(counts.ravel()) > 1e-3
    # Finer on each choice alone, where a slight bias would show most.
    for axes in ((1, 2), (0, 2), (0, 1)):
        assert chi_square(counts.sum(axis=axes)) > 1e-3


def test_distribution_matches_torchvisions_own_draws():
    data = make_copies(2000)
    variants = list(torchvision_variants(data.images[0], padding=2))
    place = {output: row for row, output in enumerate(variants)}
    ours, _ = show(make_loader(data, augmentation=Augmentation(crop_padding=2), batch_size=500))
    torch.manual_seed(0)
    theirs = transforms.Compose(
        [transforms.RandomCrop(8, padding=2), transforms.RandomHorizontalFlip()]
    )
    counts = np.zeros((2, len(variants)), dtype=int)
    for image in ours.numpy():
        counts[0, place[image.tobytes()]] += 1
    drawn = torch.stack([theirs(data.images[0]) for _ in range(2000)])
    for image in tv.normalize(drawn.float().div(255), MEAN, STD).numpy():
        counts[1, place[image.tobytes()]] += 1
    assert chi_square(counts) > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("side", "height", "width"),
    [
        pytest.param(4, 8, 8, id="even"),
        pytest.param(3, 6, 9, id="odd-wide"),
        pytest.param(1, 5, 4, id="one-pixel"),
    ],
)
def test_cutout_is_a_uniform_clipped_square_of_zeros(side, height, width, device):
    data = make_copies(2500, height, width)
    augmentation = Augmentation(crop_padding=0, flip=False, cutout=side)
    images, _ = show(make_loader(data, augmentation=augmentation, batch_size=700, device=device))
    images = images.cpu()
    plain = tv.normalize(data.images[0].float().div(255), MEAN, STD)
    assert (plain != 0).all()
    holes = {}
    for y in range(height):
        for x in range(width):
            mask = torch.zeros(height, width, dtype=torch.bool)
            top, left = y - side // 2, x - side // 2
            mask[max(0, top) : top + side, max(0, left) : left + side] = True
            holes[mask.numpy().tobytes()] = (y, x)
    assert len(holes) == height * width
    counts = np.zeros((height, width), dtype=int)
    masks = (images == 0).all(1)
    assert torch.equal(images, torch.where(masks[:, None], 0.0, plain))
    for mask in masks.numpy():
        counts[holes[mask.tobytes()]] += 1
    assert chi_square(counts.ravel()) > 1e-3


def test_cutout_larger_than_the_image_keeps_at_most_a_border():
    images, _ = show(make_loader(make_data(64), augmentation=Augmentation(0, False, cutout=16)))
    assert (images == 0).all(1).float().mean() > 0.9


def test_crop_rows_columns_flips_and_holes_are_independent():
    data = make_copies(9000)
    augmentation = Augmentation(crop_padding=1, flip=True, cutout=2)
    plan = make_loader(data, augmentation=augmentation)._plan(0)
    draws = [plan.crop_y, plan.crop_x, plan.flip, plan.hole_y, plan.hole_x]
    for first in range(5):
        for second in range(first):
            table = np.zeros((int(draws[first].max()) + 1, int(draws[second].max()) + 1))
            np.add.at(table, (draws[first].int().numpy(), draws[second].int().numpy()), 1)
            assert chi_square(table) > 1e-4


def test_each_image_draws_its_own_augmentation():
    images, _ = show(make_loader(make_copies(32), batch_size=32))
    assert len({image.tobytes() for image in images.numpy()}) > 20


def test_no_augmentation_is_plain_normalisation_in_order():
    data = make_data(21)
    images, labels = show(make_loader(data, augmentation=None, shuffle=False))
    expected = tv.normalize(data.images.float().div(255), MEAN, STD)
    assert torch.equal(images, expected)
    assert torch.equal(labels, data.labels)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"crop_padding": 0, "flip": False}, id="all-off"),
        pytest.param({"crop_padding": 0, "flip": True}, id="flip-only"),
        pytest.param({"crop_padding": 12, "flip": False}, id="padding-beyond-the-image"),
    ],
)
def test_other_augmentations_stay_within_torchvisions_outputs(changes):
    data = make_copies(40)
    variants = torchvision_variants(data.images[0], padding=changes["crop_padding"])
    images, _ = show(make_loader(data, augmentation=Augmentation(**changes)))
    seen = [variants[image.tobytes()] for image in images.numpy()]
    if not changes["flip"] and not changes["crop_padding"]:
        assert set(seen) == {(0, 0, False)}
    if changes["flip"]:
        assert {flip for _, _, flip in seen} == {False, True}


def test_an_epoch_shows_every_chosen_image_once_and_keeps_the_partial_batch():
    data = make_data(50)
    indices = np.array([40, 3, 17, 8, 49, 0, 21])
    loader = make_loader(data, indices=indices, batch_size=3, augmentation=None)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert (len(loader), loader.num_images) == (3, 7)
    shown = torch.cat([images for images, _ in batches])
    expected = tv.normalize(data.images[torch.from_numpy(indices)].float().div(255), MEAN, STD)
    rows = [int((expected == image).flatten(1).all(1).nonzero()) for image in shown]
    assert sorted(rows) == list(range(7))
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels, data.labels[torch.from_numpy(indices[rows])])


def test_an_epoch_of_25000_images_has_261_batches_the_last_of_40():
    data = ImageData(
        "tiny",
        torch.zeros(25000, 3, 1, 1, dtype=torch.uint8),
        torch.zeros(25000, dtype=torch.int64),
        ("a",),
    )
    loader = make_loader(data, batch_size=96)
    assert len(loader) == 261
    assert [len(labels) for _, labels in loader.epoch(0, start=260)] == [40]


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_start_skips_batches_without_changing_the_others(start):
    loader = make_loader(make_data(70), augmentation=Augmentation(cutout=4))
    whole = list(loader.epoch(2))
    resumed = list(loader.epoch(2, start))
    assert len(resumed) == len(whole) - start
    for (images, labels), (images_again, labels_again) in zip(whole[start:], resumed, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(labels, labels_again)


def test_batches_do_not_depend_on_earlier_or_interleaved_iteration():
    data = make_data(64)
    expected = show(make_loader(data), epoch=1)[0]
    loader = make_loader(data)
    torch.rand(5)
    np.random.rand(5)
    first, second = loader.epoch(1), loader.epoch(0)
    next(second)
    mixed = [next(first)[0]]
    next(second)
    mixed += [images for images, _ in first]
    assert torch.equal(torch.cat(mixed), expected)


def test_the_batch_size_cuts_the_same_sequence_elsewhere():
    data = make_data(50)
    assert torch.equal(
        show(make_loader(data, batch_size=7))[0], show(make_loader(data, batch_size=50))[0]
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"seed": 4}, id="seed"),
        pytest.param({"stream": "alphas"}, id="stream"),
        pytest.param({"epoch": 1}, id="epoch"),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in-order"])
def test_seed_stream_and_epoch_each_change_the_batches(changes, shuffle):
    data = make_data(48)
    changes = dict(changes)
    epoch = changes.pop("epoch", 0)
    reference = show(make_loader(data, shuffle=shuffle))
    other = show(make_loader(data, shuffle=shuffle, **changes), epoch)
    assert not torch.equal(reference[0], other[0])
    assert torch.equal(reference[1], other[1]) == (not shuffle)


def test_order_is_uniform():
    data = make_data(5)
    loader = make_loader(data, augmentation=None, batch_size=5)
    counts = np.zeros((5, 5), dtype=int)
    for epoch in range(500):
        _, labels = next(loader.epoch(epoch))
        counts[np.arange(5), labels.numpy()] += 1
    for position in counts:
        assert chi_square(position) > 1e-4


def test_draws_are_pinned():
    # Also what a seed from Python's per-process hash() could never satisfy.
    draws = keyed_generator(3, "weights", 0, "order").integers(1000, size=4)
    assert draws.tolist() == [932, 259, 965, 87]


def test_a_cpu_loader_shares_the_images_and_never_changes_them():
    data = make_data(32)
    before = data.images.clone()
    loader = make_loader(data, augmentation=Augmentation(cutout=4), indices=np.arange(0, 32, 2))
    show(loader)
    assert loader._images.data_ptr() == data.images.data_ptr()
    assert torch.equal(data.images, before)


def test_another_device_receives_only_the_images_it_serves():
    data = make_data(32)
    loader = make_loader(data, indices=np.array([5, 9]), device="meta")
    assert loader._images.shape == (2, 3, 8, 8)
    assert loader.num_images == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtype_of_the_batches(dtype):
    data = make_data(20)
    images, labels = show(make_loader(data, augmentation=None, shuffle=False, dtype=dtype))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = tv.normalize(data.images.to(compute).div(255), MEAN, STD).to(dtype)
    assert images.dtype == dtype
    assert labels.dtype == torch.int64
    assert torch.equal(images, expected)


def test_it_is_a_loader():
    assert isinstance(make_loader(make_data(4)), Loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"batch_size": 0}, "batch_size must be at least 1, got 0", id="batch-size"),
        pytest.param({"dtype": torch.int32}, "floating-point", id="dtype"),
        pytest.param({"indices": np.array([], dtype=int)}, "at least one image", id="no-image"),
        pytest.param({"indices": np.array([0, 9])}, "run from 0 to 9", id="index-too-large"),
        pytest.param({"indices": np.array([-1])}, "run from -1", id="negative-index"),
        pytest.param({"indices": np.array([0.5])}, "integer array", id="float-index"),
        pytest.param({"indices": np.array([[1]])}, "one-dimensional", id="index-table"),
        pytest.param({"indices": np.array([True] * 9)}, "integer array", id="boolean-mask"),
        pytest.param({"mean": (0.5,)}, "mean must be 3 finite", id="short-mean"),
        pytest.param({"std": (1, 1, float("nan"))}, "std must be 3 finite", id="nan-std"),
        pytest.param({"std": (1, 0, 1)}, "std must be positive", id="zero-std"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_data(9), **changes)


@pytest.mark.parametrize(
    ("epoch", "start", "message"),
    [
        pytest.param(-1, 0, "epoch must be 0 or more", id="negative-epoch"),
        pytest.param(0, -1, "between 0 and 1 batches, got -1", id="negative-start"),
        pytest.param(0, 2, "between 0 and 1 batches, got 2", id="start-beyond-the-end"),
    ],
)
def test_bad_positions_are_refused_at_the_call(epoch, start, message):
    loader = make_loader(make_data(9))
    with pytest.raises(ValueError, match=message):
        loader.epoch(epoch, start)


def test_negative_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"crop_padding must be 0 .* got -1"):
        Augmentation(crop_padding=-1)
    with pytest.raises(ValueError, match=r"cutout must be 0 .* got -2"):
        Augmentation(cutout=-2)


def test_the_chi_square_of_these_tests_sees_a_bias():
    # Critical value of 9 degrees of freedom at 5 %: 16.919.
    even = np.full(10, 1000.0)
    even[:2] += np.array([1, -1]) * np.sqrt(16.919 * 1000 / 2)
    assert chi_square(even) == pytest.approx(0.05, abs=1e-4)
    assert chi_square(np.array([[300, 200], [200, 300]])) < 1e-6
